"""README.md, CONTRIBUTING.md and docs/ against the code: what they name is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_coverage import CI, COVERED, LAUNCHERS, to_run
from docs_reading import (
    NEEDS,
    PAGES,
    REPOSITORY,
    Command,
    anchors,
    blocks,
    code_spans,
    commands,
    prose,
    read,
    tables,
)

from mesh.config.evaluation_sets import documented_keys
from mesh.config.keys import conf_keys
from tools.config_reference import reference

COMMANDS = [command for page in PAGES for command in commands(page)]
DOCUMENTED = {key.name for key in documented_keys()}
# take any name below them
FREE = ("task_args", "loss_args", "prompt.template_args", "eval.sets", "trainer.optimizer_args")
RECIPES_OWN = {"recipes/replay.py": ("step",)}
PROGRAM = re.compile(r"(recipes|tools)/\w+\.py|tools(\.\w+)+")
# what looks like a path of ours in running text
PATH = re.compile(r"(?:mesh|recipes|tools|tests|conf|docs)/[\w./-]*\w|LOG\.md|CONTRIBUTING\.md")


def test_the_readme_is_short():
    assert len(read(Path("README.md")).encode()) <= 10 * 1024


def test_the_key_reference_is_what_the_schema_says():
    """Else: python tools/config_reference.py > docs/configuration.md"""
    assert read(Path("docs/configuration.md")) == reference()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page):
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)|src=\"([^\"]+)\"", prose(page))
    for target in [one or other for one, other in targets]:
        name, _, anchor = target.partition("#")
        path = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(REPOSITORY)), target


def test_every_page_is_found_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)[)#]", read(Path("README.md"))))
    assert linked == {str(page) for page in PAGES if page.parts[0] == "docs"}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_paths_that_are_named_exist(page):
    named = {path for span in code_spans(prose(page)) for path in PATH.findall(span)}
    missing = {path for path in named if not list(REPOSITORY.glob(path.rstrip("/") + "*"))}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_keys_of_tables_exist(page):
    """Tables whose first column is `key`; `.tp` after `trainer.dp_shard` is `trainer.tp`."""
    for table in (table for table in tables(page) if table[0][0] == "key"):
        for row in table[1:]:
            group = ""
            for name in code_spans(row[0]):
                full = f"{group}{name}" if name.startswith(".") else name
                group = full.rpartition(".")[0]
                assert full in DOCUMENTED or full in ("conf", *FREE), full


def recipe_of(command: Command) -> str | None:
    found = [word for word in command.words if re.fullmatch(r"recipes/\w+\.py", word)]
    return found[-1] if found else None


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_name_programs_and_keys_that_exist(command):
    for program in (found[0] for found in PROGRAM.finditer(command.text)):
        path = program if program.endswith(".py") else program.replace(".", "/") + ".py"
        assert (REPOSITORY / path).is_file(), program
    recipe = recipe_of(command)
    if recipe is None or "tools/monarch.py" in command.words:
        return
    known = {*conf_keys(), "conf", *RECIPES_OWN.get(recipe, ())}
    words = command.words[command.words.index(recipe) + 1 :]
    names = [word.partition("=")[0] for word in words if "=" in word]
    assert not [name for name in names if name not in known and not name.startswith(FREE)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_shell_blocks_say_what_they_need_in_words_that_are_known(page):
    needs = {block.needs for block in blocks(page) if block.language == "bash"}
    assert needs <= {"", *NEEDS}
    assert not {block.language for block in blocks(page)} - {"bash", "python", "diff", "yaml", ""}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_yaml_blocks_have_keys_of_the_configuration(page):
    for block in blocks(page):
        if block.language == "yaml":
            names = [
                re.sub(r"^(eval\.sets)\.\w+", r"\1.NAME", name)
                for name in dotted(yaml.safe_load(block.text))
            ]
            assert names
            assert not {name for name in names if not name.startswith("task_args.")} - DOCUMENTED


def dotted(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys of a nested mapping as the command line writes them."""
    found = []
    for name, value in tree.items():
        nested = isinstance(value, dict) and name != "task_args"
        found += dotted(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return found


@pytest.mark.parametrize("command", to_run(), ids=str)
def test_a_command_runs_or_says_what_it_needs(command):
    """Else: name the test that covers it in tests/docs_coverage.py, or mark its block."""
    assert LAUNCHERS.match(command.text) or command.text.startswith("export ")


def test_commands_are_read_whole():
    page = Path("docs/launching.md")
    (batch,) = (command for command in commands(page) if command.text.startswith("sbatch"))
    assert batch.text.endswith("checkpoint.every=50'") and " srun torchrun " in batch.text
    (monarch,) = (
        c for c in commands(page) if c.text.startswith("pip install") and "monarch" in c.text
    )
    assert monarch.needs == "install" and "#" not in monarch.text


def test_covering_tests_exist_and_cover_what_is_written():
    texts = {command.text for command in COMMANDS}
    assert set(COVERED) <= texts, "a command that no page has any more"
    for place in set(COVERED.values()) - {CI}:
        file, _, name = place.partition("::")
        tree = ast.parse((REPOSITORY / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, place


def test_what_ci_covers_is_the_readmes_block_or_part_of_it():
    in_block = [
        c.text for c in COMMANDS if c.page == Path("README.md") and COVERED.get(c.text) == CI
    ]
    assert len(in_block) == 3
    for text, place in COVERED.items():
        if place == CI:
            assert any(text.removesuffix(" tests/unit") in whole for whole in in_block), text


@cache
def constants() -> str:
    """All text of the code, the constant parts of f-strings included, one to a line."""
    paths = [p for room in ("mesh", "recipes", "tools") for p in (REPOSITORY / room).rglob("*.py")]
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


NOT_OURS = {
    "CUDA out of memory", "logprob_diff", "num_prompts",
    "Model architectures ['MeshPolicy'] are not supported",
}  # fmt: skip


def messages() -> list[str]:
    """The code spans of the first column of troubleshooting's tables."""
    rows = [row for table in tables(Path("docs/troubleshooting.md")) for row in table[1:]]
    return [span for row in rows for span in code_spans(row[0]) if span not in NOT_OURS]


@pytest.mark.parametrize("message", messages())
def test_troubleshooting_quotes_what_the_code_says(message):
    assert message in constants()
