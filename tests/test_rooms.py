"""The layout of the code base (CONTRIBUTING.md, "Where things live"): rooms, cycles, lines, vocabulary."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import tailora

LOW, HIGH = (
    "errors quiet patches core formats model data kernels engine",
    "train evaluation study verify report serve cli",
)
ROOMS = f"{LOW} {HIGH}".split()
RANK = {room: rank for rank, room in enumerate(ROOMS)}
PACKAGE = Path(tailora.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MOST_LINES = {
    "errors": 200,
    "quiet": 70,
    "core": 6770,
    "formats": 3950,
    "model": 520,
    "data": 4610,
    "kernels": 1520,
    "engine": 940,
    "train": 10420,
    "evaluation": 2760,
    "study": 5100,
    "verify": 990,
    "report": 2910,
    "serve": 2010,
    "cli": 4380,
}
MOST_LINES_OF_A_FILE = 600
REASON = "This file is long because"  # in the docstring of a file with more lines

# Words that meant several things, or nothing to a newcomer. The glossary in docs/ has the words to use.
BANNED = frozenset(
    """
    subject Subject Feed Kit Bench halves tails within ahead finals seats wish say told heard emit become publish settle
    take_up claim held bury found each one places hosts
    """.split()  # noqa: SIM905
)


def count_lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and module of every import in a file, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if name in MODULES else str(node.module)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "tailora" and len(parts) > 1 and parts[1] in RANK else None


def upward(room: str, tree: ast.Module) -> list[str]:
    return [
        f"line {line}: {module}"
        for line, module in imports(tree)
        if (target := room_of(module)) is not None and RANK[target] > RANK[room]
    ]


def test_imports_point_down() -> None:
    rooms = {path: room_of(module_name(path)) for path in FILES}
    assert [path for path, room in rooms.items() if room is None] == [PACKAGE / "__init__.py", PACKAGE / "__main__.py"]
    assert not [f"{path}, {line}" for path, room in rooms.items() if room for line in upward(room, TREES[path])]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def import_graph(trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    return {
        module_name(path): {module for _, module in imports(tree) if module in MODULES - {module_name(path)}}
        for path, tree in trees.items()
    }


def test_no_import_cycle_also_inside_functions() -> None:
    assert not cycle(import_graph(TREES))
    inside_a_function = ast.parse("def late():\n    from tailora.cli import main")
    assert cycle(import_graph({**TREES, PACKAGE / "errors.py": inside_a_function}))


def test_rooms_stay_within_their_lines() -> None:
    lines: Counter[str] = Counter()
    for path in FILES:
        if (room := room_of(module_name(path))) is not None:
            lines[room] += count_lines(path)
    assert not [f"{room}: {lines[room]} lines" for room, most in MOST_LINES.items() if lines[room] > most]


def test_a_long_file_says_why() -> None:
    long = [path for path in FILES if count_lines(path) > MOST_LINES_OF_A_FILE]
    assert not [path for path in long if REASON not in (ast.get_docstring(TREES[path]) or "")]


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


def test_names_are_those_of_the_vocabulary() -> None:
    assert not [path for path in FILES if path.stem in BANNED]
    assert not [f"{path}, {line}" for path, tree in TREES.items() for line in banned(tree)]
