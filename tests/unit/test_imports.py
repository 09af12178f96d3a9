"""The rules of CONTRIBUTING.md: imports point down, outside worlds have one door, code is small."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# from the top down: a room imports only from lines below its own, and from itself
HOUSE = """
    exactness
    program
    checkpoint
    runs
    roles
    engine
    exchange
    weights model
    rl
    tasks
    text layout
    invariant
    lifecycle
    config
    types
"""
PURE = [
    *(f"rl/{name}" for name in ("advantages", "aggregation", "cutting", "objective")),
    *(f"rl/losses/{name}" for name in ("divergence", "importance", "nouns", "sequences")),
    *(
        "rl/losses/surrogates",
        "rl/losses/table",
        "rl/packing",
        "rl/statistics",
        "rl/step",
        "layout/reshard",
    ),
]
MOST_FUNCTION_LINES = 60
MOST_CLASS_LINES = 250
MOST_FILE_LINES = 300
Kinds = tuple[type, ...]
FUNCTIONS: Kinds = (ast.FunctionDef, ast.AsyncFunctionDef)


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


def room_of(name: str) -> str | None:
    """`mesh.model.hf` and `mesh.model` are `model`; None outside the package."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "mesh" and rest else None


def rooms(path: Path) -> set[str]:
    return {room for name in imports(path) if (room := room_of(name)) is not None}


def own_room(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


LIBRARY = [path for path in sources("mesh") if path != Path("mesh/__init__.py")]
ALL = sources("mesh", "recipes", "tools")
LEVELS = [line.split() for line in HOUSE.strip().splitlines()]
LEVEL = {room: level for level, line in enumerate(LEVELS) for room in line}


def test_the_house_has_these_rooms_and_no_loose_module():
    assert {own_room(path) for path in LIBRARY} == set(LEVEL)
    assert not [path for path in LIBRARY if len(path.parts) == 2]
    assert len(set(LEVEL) - {"types"}) <= 16


def test_the_map_in_the_docs_names_the_rooms_in_this_order():
    """Lines `  ROOM/   text` below a line `mesh/`; `types/` is the last."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    found = re.search(r"^```\nmesh/\n(.*?)^```$", page, re.M | re.S)
    assert found, "docs/architecture.md: no code block that begins with a line mesh/"
    drawn = re.findall(r"^  (\w+)/ +\S", found[1], re.M)
    assert len(drawn) == len(found[1].splitlines()), "a line of the map is no `  ROOM/   text`"
    assert sorted(drawn) == sorted({own_room(path) for path in LIBRARY})
    assert [LEVEL[room] for room in drawn] == sorted(LEVEL[room] for room in drawn)


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_imports_point_downwards(path):
    own = own_room(path)
    wrong = {room for room in rooms(path) - {own} if LEVEL[room] <= LEVEL[own]}
    assert not wrong, f"{path} imports {sorted(wrong)}, which are not below it"


@pytest.mark.parametrize("path", ALL, ids=str)
def test_programs_are_imported_by_programs_of_their_own_kind(path):
    """A tool imports from its own folder and what lies beside the folders; nobody else does."""
    roots = {name.partition(".")[0] for name in imports(path)}
    assert not roots & ({"recipes", "tools", "tests"} - {path.parts[0]})
    folders = {name.split(".")[1] for name in imports(path) if name.startswith("tools.")}
    others = {"bench", "chaos", "monarch"} - {path.parts[1].removesuffix(".py")}
    assert not folders & others


@pytest.mark.parametrize("name", PURE)
def test_the_maths_is_pure(name):
    found = imports(Path("mesh", f"{name}.py"))
    assert "config" not in rooms(Path("mesh", f"{name}.py"))
    assert not {other for other in found if other.startswith("torch.distributed")}
    assert "logging" not in found


@pytest.mark.parametrize("path", ALL, ids=str)
def test_outside_worlds_have_one_door(path):
    roots = {name.partition(".")[0] for name in imports(path)}
    doors = {
        "torchtitan": path.parts[:2] == ("mesh", "model"),
        # the engine, and what it is measured against
        "vllm": str(path).startswith(("mesh/engine/vllm/", "tools/bench/plain_vllm.py")),
        "monarch": path == Path("tools/monarch/procs.py"),
    }
    assert not {world for world, open_here in doors.items() if world in roots and not open_here}


def sizes(tree: ast.AST, kinds: Kinds, within: str = "") -> list[tuple[str, int]]:
    """Lines of every function or class in a tree, nested ones too, by qualified name.

    Two may have one name, as a property's getter and setter do; each is listed.
    """
    found = []
    for node in ast.iter_child_nodes(tree):
        name = within
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            name = f"{within}.{node.name}" if within else node.name
            if isinstance(node, kinds):
                found.append((name, (node.end_lineno or 0) - node.lineno + 1))
        found += sizes(node, kinds, name)
    return found


@pytest.mark.parametrize("path", ALL, ids=str)
def test_functions_classes_and_files_stay_small(path):
    tree = tree_of(path)
    functions, classes = sizes(tree, FUNCTIONS), sizes(tree, (ast.ClassDef,))
    assert [(name, n) for name, n in functions if n > MOST_FUNCTION_LINES] == []
    assert [(name, n) for name, n in classes if n > MOST_CLASS_LINES] == []
    lines = len((REPOSITORY / path).read_text().splitlines())
    assert lines <= MOST_FILE_LINES


def test_no_function_hides_behind_another_of_its_name():
    source = """
class A:
    def f(self):
        if self:
            def g():
                pass

    @f.setter
    def f(self):
        pass

class B:
    async def f(self): pass
"""
    tree = ast.parse(source)
    assert sizes(tree, FUNCTIONS) == [("A.f", 4), ("A.f.g", 2), ("A.f", 2), ("B.f", 1)]
    assert sizes(tree, (ast.ClassDef,)) == [("A", 9), ("B", 2)]


def assignments_into(tree: ast.AST, name: str) -> list[str]:
    """Targets of assignments and deletions, and setattr's objects, that lie inside `name`.

    `self.conf = x` lies outside: it is `self` that is assigned to.
    """
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            found.append(node.value)
        call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if call in ("setattr", "object.__setattr__", "delattr") and node.args:
            found.append(node.args[0])
    texts = map(ast.unparse, found)
    return [text for text in texts if name in text.replace("[", ".").split(".")]


def test_no_module_assigns_into_a_configuration():
    """Its mappings (task_args, loss_args) too, which being frozen does not guard."""
    source = """
conf.steps = 3
conf.trainer.tp += 1
self.conf.task_args["a"] = 1
setattr(conf, "steps", 3)
del conf.loss_args["a"]
self.conf = conf
conf, other = changed(conf, {}), 2
conf.seed, other = 1, 2
record[conf.steps] = 1
"""
    assert len(assignments_into(ast.parse(source), "conf")) == 6
    found = {str(path): assignments_into(tree_of(path), "conf") for path in ALL}
    assert {path: targets for path, targets in found.items() if targets} == {}


@pytest.mark.parametrize("path", sources("recipes"), ids=str)
def test_a_recipe_is_functions_and_its_docstring_says_what_is_left_out(path):
    tree = tree_of(path)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert "Left out" in (ast.get_docstring(tree) or "")
    assert "rank ==" not in (REPOSITORY / path).read_text()


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by their names alone, and would not collect the second one."""
    files = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    names = [path.name for path in files]
    assert len(files) > 100 and sorted(set(names)) == sorted(names)
