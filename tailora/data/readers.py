"""Readers of single files: JSON lines, JSON, CSV, Parquet. Each yields rows, and faults for what it cannot read."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tailora.errors import ConfigError, DataError, listing, nearest

# ---- One row of a data file, and one row that cannot be used.


SHOWN = 20


@dataclass(frozen=True, slots=True)
class Row:
    """`number` is the line of a text file, or the item's place in any other form; both count from 1."""

    file: str
    number: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row cannot be used; `number` 0 means the whole file."""

    file: str
    number: int
    cause: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.cause}" if self.number else f"{self.file}: {self.cause}"


def refusal(faults: Sequence[Fault]) -> DataError:
    """One error for all faults: the first 20 in full, the rest counted."""
    lines = [str(fault) for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        return DataError(
            f"{len(faults)} problems:\n"
            + "\n".join([*(f"  - {line}" for line in lines), f"  and {len(faults) - SHOWN} more"])
        )
    return DataError(listing(lines))


# ----


Read = Iterator[Row | Fault]
LONGEST_FIELD = 2**31 - 1  # characters of a CSV field: what a C long holds everywhere; Python's limit is 131,072


def read_lines(path: Path) -> Read:
    """One JSON object a line; blank lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parsed(str(path), number, line)


def _parsed(file: str, number: int, line: bytes) -> Row | Fault:
    try:
        value = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return Fault(file, number, _not_utf8(error))
    except json.JSONDecodeError as error:
        return Fault(file, number, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands
        return Fault(file, number, f"not JSON that can be read: {error}")
    return _row(file, number, value)


def _row(file: str, number: int, value: Any) -> Row | Fault:
    if isinstance(value, dict):
        return Row(file, number, value)
    return Fault(file, number, f"a JSON {type(value).__name__} where an object {{...}} is needed")


def read_json(path: Path) -> Read:
    """A list of objects, an object that holds one such list, or JSON lines under the name .json."""
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield Fault(str(path), 0, _not_utf8(error))
        return
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from read_lines(path)
        else:
            yield Fault(str(path), error.lineno, f"not JSON: {error.msg} at column {error.colno}")
        return
    except (ValueError, RecursionError) as error:
        yield Fault(str(path), 0, f"not JSON that can be read: {error}")
        return
    for number, item in enumerate(_items(value), 1):
        yield _row(str(path), number, item)


def _items(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and len(value) == 1:
        (inner,) = value.values()
        turns = ("role", "from")  # of one conversation, which is a row
        if isinstance(inner, list) and all(isinstance(item, dict) and not item.keys() & turns for item in inner):
            return inner
    return [value]


def read_table(path: Path, delimiter: str) -> Read:
    """Separated values whose first line names the columns. A row's number is its last line."""
    with path.open("rb") as file:
        lines = (line.decode("utf-8-sig") for line in file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = _values(reader) or []
            twice = sorted(name for name, count in Counter(header).items() if count > 1)
            if twice:
                yield Fault(str(path), 1, f"the header names {', '.join(twice)} more than once")
                return
            while (values := _values(reader)) is not None:
                if values:
                    yield _table_row(str(path), reader.line_num, header, values)
        except UnicodeDecodeError as error:
            yield Fault(str(path), reader.line_num + 1, _not_utf8(error))
        except csv.Error as error:
            yield Fault(str(path), reader.line_num, f"not CSV: {error}")


def _values(reader: Iterator[list[str]]) -> list[str] | None:
    """The next line's values, of any length; None at the end. csv's limit is the whole process's, so it is put back."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _table_row(file: str, number: int, header: list[str], values: list[str]) -> Row | Fault:
    if len(values) != len(header):
        return Fault(file, number, f"{len(values)} values where the header names {len(header)} columns")
    return Row(file, number, dict(zip(header, values, strict=True)))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"


def read_csv(path: Path) -> Read:
    return read_table(path, ",")


def read_tsv(path: Path) -> Read:
    return read_table(path, "\t")


def read_parquet(path: Path) -> Read:
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for fields in batch.to_pylist():
                number += 1
                yield Row(str(path), number, fields)
    except pyarrow.ArrowException as error:
        yield Fault(str(path), number, f"not Parquet: {str(error).splitlines()[0]}")


READERS: dict[str, Callable[[Path], Read]] = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}


def read_file(path: Path) -> Read:
    """Rows of one file, by its suffix; a file that cannot be opened is a fault."""
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        yield Fault(str(path), 0, error.strerror or str(error))


# ---- The Hub: rows through `datasets`, of Hub ids and of folders that it saved; and whether a model is there.


OFFLINE = (
    "the Hub cannot be reached (no network, a proxy, or HF_HUB_OFFLINE): pass a file or folder instead, or fetch it "
    "once on a connected machine with `hf download --repo-type dataset {name} --local-dir FOLDER` and pass FOLDER"
)
SECONDS = 5.0  # that the Hub has to answer whether it has a model
NAMES = "a configuration is asked for as owner/name:configuration, a split as owner/name[split]"


def read_hub(source: str, split: str, streaming: bool) -> Iterator[Row]:
    """Rows of the Hub data set `owner/name` or `owner/name:configuration`. Raises DataError when it cannot be read."""
    import datasets

    name, _, configuration = source.partition(":")
    with _translated(source, name):
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
        for number, fields in enumerate(rows, 1):
            yield Row(f"{source}[{split}]", number, fields)


def read_saved(folder: Path, split: str) -> Iterator[Row]:
    """Rows of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    with _translated(str(folder), str(folder)):
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, dict) and split not in saved:
            raise DataError(f"data {folder}: no split {split!r}{nearest(split, saved)}; there are {', '.join(saved)}")
        rows = saved[split] if isinstance(saved, dict) else saved
        for number, fields in enumerate(rows, 1):
            yield Row(str(folder), number, fields)


@contextmanager
def _translated(source: str, name: str) -> Iterator[None]:
    """Turn what `datasets` and the Hub's client raise into a DataError that says what to do."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except ConnectionError:
        raise DataError(f"data {source}: no such file or folder here, and {OFFLINE.format(name=name)}") from None
    except DataError:
        raise
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise DataError(f"data {source}: {cause} ({NAMES})") from None


def check_model(name: str) -> None:
    """Ask the Hub once for a model that is not on this machine: transformers asks six times per file, waiting longer
    each time, which is most of a minute without a network.

    Raises ConfigError when the Hub cannot be reached or has no such model.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's or httpx2's
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if Path(name).is_dir():
        return
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=SECONDS)
    except RepositoryNotFoundError:
        raise ConfigError(_no_model(name, "the Hub has no such model, or a private one")) from None
    except HfHubHTTPError:
        return  # the Hub answers, and is busy: worth asking again
    except HFValidationError:
        raise ConfigError(_no_model(name, "it is not a Hub id")) from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(_no_model(name, f"the Hub cannot be reached ({cause})")) from None


def _no_model(name: str, cause: str) -> str:
    path = Path(name)
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    return (
        f"model {name!r}: no such folder here, and {cause}{nearest(path.name, beside) or '.'} "
        "Give a folder, a Hub id such as owner/name, or 'demo'; HF_TOKEN opens private and gated models"
    )


# ---- Where rows come from: a file, a folder of files, a folder that `datasets` saved, or a Hub id.


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
