"""Where rows come from: a file, a folder of files, a folder that `datasets` saved, or a Hub id."""

import re
from collections.abc import Iterator
from pathlib import Path

from tailora.data.hub import read_hub, read_saved
from tailora.data.readers import READERS, read_file
from tailora.data.rows import Fault, Row
from tailora.errors import DataError, nearest

FORMS = ", ".join(READERS)
# `datasets` marks a folder that it saved with one of these
SAVED = ("dataset_dict.json", "state.json")
# owner/name, and a configuration after a colon
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
WITH_SPLIT = re.compile(r"(?P<source>[^\[]+)\[(?P<split>.+)\]")


def read_rows(source: str, *, split: str = "train", streaming: bool = False) -> Iterator[Row | Fault]:
    """Rows of `source` in their order, and a `Fault` for each that cannot be read.

    split: which part of a folder or Hub data set, unless the source says it: `owner/name[test]`. In a folder the
        names of the files decide.
    streaming: Hub data is read while it is used, not downloaded first. Files are always read as they are used.
    Raises DataError when there is nothing to read from.
    """
    path = Path(source).expanduser()
    if not path.exists() and (chosen := WITH_SPLIT.fullmatch(source)):
        return read_rows(chosen["source"], split=chosen["split"], streaming=streaming)
    if path.is_file():
        return read_file(_readable(path))
    if path.is_dir():
        return _read_folder(path, split)
    neighbours = nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
    if neighbours or path.suffix.lower() in READERS or not HUB_ID.fullmatch(source):
        raise DataError(f"data {source}: no such file or folder, and not a Hub id like owner/name{neighbours}")
    return read_hub(source, split, streaming)


def _readable(path: Path) -> Path:
    if path.suffix.lower() not in READERS:
        raise DataError(f"data {path}: the form {path.suffix or 'without a suffix'} is unknown; readable are {FORMS}")
    return path


def _read_folder(folder: Path, split: str) -> Iterator[Row | Fault]:
    if any((folder / mark).exists() for mark in SAVED):
        return read_saved(folder, split)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in READERS and path.is_file())
    if not files:
        raise DataError(f"data {folder}: the folder holds no data file; readable are {FORMS}")
    chosen = _of_split(folder, files, split)
    if not chosen:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:10])
        raise DataError(f"data {folder}: no file for the split {split!r}; there are {names}")
    return (row for path in chosen for row in read_file(path))


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Files named after the split (train.jsonl, train-00000-of-2.parquet, train/x.csv); all when no file names one."""
    named = {path: _split_of(path.relative_to(folder)) for path in files}
    if not any(named.values()):
        return files
    return [path for path in files if named[path] == split]


def _split_of(path: Path) -> str | None:
    for part in (path.stem, path.parent.name):
        found = re.match(r"(train|validation|valid|dev|eval|test)(?![a-z])", part.lower())
        if found:
            return {"valid": "validation", "dev": "validation", "eval": "validation"}.get(found[1], found[1])
    return None
