"""Imports between the rooms point down only (CONTRIBUTING.md, "Where things live")."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tailora

ROOMS = [
    "errors",
    "quiet",
    "core",
    "formats",
    "model",
    "data",
    "kernels",
    "train",
    "evaluation",
    "study",
    "report",
    "serve",
    "cli",
]
RANK = {room: rank for rank, room in enumerate(ROOMS)}
PACKAGE = Path(tailora.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imported_rooms(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            modules = [
                f"{node.module}.{alias.name}" if node.module == "tailora" else str(node.module) for alias in node.names
            ]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "tailora" and len(parts) > 1 and parts[1] in RANK:
                yield node.lineno, parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in RANK, f"{path} is in no room of the design"
    upward = [
        f"line {line}: {target}"
        for line, target in imported_rooms(ast.parse(path.read_text()))
        if RANK[target] > RANK[room]
    ]
    assert not upward, f"{room} looks up at {upward}"


def test_the_check_sees_an_upward_import() -> None:
    tree = ast.parse("from tailora.train.trainer import run\nimport tailora.cli\nfrom tailora import data")
    assert [room for _, room in imported_rooms(tree)] == ["train", "cli", "data"]
