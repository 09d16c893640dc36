"""The layout of the code base (CONTRIBUTING.md, "Where things live"): rooms, cycles, number of files, vocabulary."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tailora

ROOMS = "errors quiet core formats model data kernels engine train evaluation study verify report serve cli".split()  # noqa: SIM905
RANK = {room: rank for rank, room in enumerate(ROOMS)}
PACKAGE = Path(tailora.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MOST_FILES = 199

# Words that meant several things, or nothing to a newcomer. The glossary in docs/ has the words to use.
BANNED = frozenset(
    """
    subject Subject Feed Kit Bench halves tails within ahead finals seats wish say told heard emit become publish settle
    take_up claim held bury found each one places hosts
    """.split()  # noqa: SIM905
)
JSON_KEYS = {"study/advice.py": {"one"}}  # names in report.json, which stay what they were


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def imports(nodes: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Line and module of every import among these statements, also below `if` and `try`, but not inside functions."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if name in MODULES else str(node.module)
        elif isinstance(node, ast.If | ast.Try):
            yield from imports(node.body)
            yield from imports(node.orelse)


def all_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Those inside functions too."""
    yield from imports([node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)])


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "tailora" and len(parts) > 1 and parts[1] in RANK else None


def upward(room: str, tree: ast.Module) -> list[str]:
    return [
        f"line {line}: {module}"
        for line, module in all_imports(tree)
        if (target := room_of(module)) is not None and RANK[target] > RANK[room]
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_point_down(path: Path) -> None:
    room = room_of(module_name(path))
    assert room is not None, f"{path} is in no room of the layout"
    assert not upward(room, TREES[path])


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_cycle_also_under_type_checking() -> None:
    graph = {
        module_name(path): {module for _, module in imports(tree.body) if module in MODULES - {module_name(path)}}
        for path, tree in TREES.items()
    }
    assert not cycle(graph)
    graph["tailora.errors"] = {"tailora.cli.main"}
    assert cycle(graph)


def test_few_files() -> None:
    assert len(FILES) <= MOST_FILES


def test_what_tests_share_has_names_of_its_own() -> None:
    """Tests import all of them by these names (`pythonpath` in pyproject.toml)."""
    folders = (PACKAGE.parent / name for name in ("tests", "docs"))
    files = Counter(path.stem for folder in folders for path in folder.glob("*.py"))
    assert not [name for name, count in files.items() if count > 1 or name in sys.stdlib_module_names]


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of all that a file defines: functions, classes, parameters, variables, attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
            case ast.alias(asname=str(name)):
                yield 0, name


def banned(tree: ast.Module) -> list[str]:
    return [f"line {line}: {name}" for line, name in names(tree) if name.strip("_") in BANNED]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_are_those_of_the_vocabulary(path: Path) -> None:
    assert path.stem not in BANNED
    keys = JSON_KEYS.get(str(path.relative_to(PACKAGE)), set())
    assert not [place for place in banned(TREES[path]) if place.rpartition(" ")[2] not in keys]
