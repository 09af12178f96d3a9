"""The house (STYLE.md): imports point downwards, outside worlds have one door, code stays small."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# from the ground up: a module imports only from lines above its own, a package also from itself
HOUSE = """
    types conf pulse
    keys
    directory
    usage cli
    advantage loss batch reshard
    invariant
    fit layout
    exchange step finite
    digest holdings sums weights
    tokenizer tasks
    model
    trainer engine
    trace
    generator evaluate
    checks
    ending watchdog guard process run
    connect
    phases progress metrics compare replay checkpoint
    program
    strict ladder
"""
PURE = ["advantage", "batch", "loss", "reshard", "step"]
MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 300


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    return sorted(path.relative_to(REPOSITORY) for path in found)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text())


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports anywhere in it: `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit_of(name: str) -> str | None:
    """`mesh.model.hf` and `mesh.model` are `model`; None outside the package."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "mesh" and rest else None


def units(path: Path) -> set[str]:
    return {unit for name in imports(path) if (unit := unit_of(name)) is not None}


def unit_of_file(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


LIBRARY = [path for path in sources("mesh") if path != Path("mesh/__init__.py")]
ALL = sources("mesh", "recipes", "tools")


def test_every_module_has_its_place():
    assert {unit_of_file(path) for path in LIBRARY} == set(HOUSE.split())
    assert len(HOUSE.split()) == len(set(HOUSE.split()))


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_imports_point_downwards(path):
    order = HOUSE.split()
    own = unit_of_file(path)
    above = {unit for unit in units(path) - {own} if order.index(unit) > order.index(own)}
    assert not above, f"{path} imports {sorted(above)}, which lie above it"


@pytest.mark.parametrize("path", sources("mesh", "recipes", "tools"), ids=str)
def test_nothing_imports_programs(path):
    roots = {name.partition(".")[0] for name in imports(path)}
    assert not roots & {"recipes", "tools", "tests"}


@pytest.mark.parametrize("name", PURE)
def test_the_maths_is_pure(name):
    found = imports(Path("mesh", f"{name}.py"))
    assert "mesh.conf" not in found
    assert not {other for other in found if other.startswith("torch.distributed")}
    assert not found & {"logging", "mesh.metrics"}


@pytest.mark.parametrize("path", ALL, ids=str)
def test_outside_worlds_have_one_door(path):
    roots = {name.partition(".")[0] for name in imports(path)}
    doors = {
        "torchtitan": path.parts[:2] == ("mesh", "model"),
        # the engine, and what it is measured against
        "vllm": str(path).startswith(("mesh/engine/vllm", "tools/plain_vllm.py")),
        "monarch": path == Path("tools/monarch_procs.py"),
    }
    assert not {world for world, open_here in doors.items() if world in roots and not open_here}


@pytest.mark.parametrize("path", ALL, ids=str)
def test_functions_and_files_stay_small(path):
    lines = (REPOSITORY / path).read_text().splitlines()
    functions = [
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: n for name, n in sizes.items() if n > MOST_FUNCTION_LINES} == {}
    assert len(lines) <= MOST_FILE_LINES


@pytest.mark.parametrize("path", sources("recipes"), ids=str)
def test_a_recipe_is_functions_and_its_docstring_says_what_is_left_out(path):
    tree = tree_of(path)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert "Left out" in (ast.get_docstring(tree) or "")
    assert "rank ==" not in (REPOSITORY / path).read_text()
