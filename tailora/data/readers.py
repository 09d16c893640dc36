"""Reads rows from a file, a folder of files, a folder saved by `datasets`, or a dataset on the Hub.

A text file is one row, {"text": ...}.
"""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tailora.data.images import IS_URL, TO_DOWNLOAD
from tailora.errors import DataError, listing, nearest, nearest_path, value_type

MAX_SHOWN = 20  # problems in one error
ARROW_ROWS = 64  # to read at a time; each may contain images
MAX_FIELD = 2**31 - 1  # characters of a CSV field; Python's own limit is 131,072
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "|"}
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")  # owner/name, and a configuration after a colon
WITH_SPLIT = re.compile(r"(?P<source>[^\[]+)\[(?P<split>.+)\]")


@dataclass(frozen=True, slots=True)
class Row:
    file: str
    number: int  # the line of a text file, or if `is_item` the position in any other file, from 1
    fields: dict[str, Any]
    is_item: bool = False

    @property
    def location(self) -> str:
        return f"{self.file}, item {self.number}" if self.is_item else f"{self.file}:{self.number}"

    def problem(self, cause: object) -> "RowProblem":
        return RowProblem(self.file, self.number, str(cause), self.is_item, self.fields)


@dataclass(frozen=True, slots=True)
class RowProblem:
    """The reason why a row cannot be used."""

    file: str
    number: int  # of the row; 0 stands for the whole file or the rest of it
    cause: str
    is_item: bool = False
    content: Any = field(default=None, compare=False)  # the fields of the row, or the text of its line

    @property
    def location(self) -> str:
        return Row(self.file, self.number, {}, self.is_item).location if self.number else self.file

    def __str__(self) -> str:
        return f"{self.location}: {self.cause}"


Rows = Iterator[Row | RowProblem]


def data_error(problems: Sequence[RowProblem]) -> DataError:
    """Returns one error for all problems: the first 20, and the number of further ones."""
    text = listing([str(problem) for problem in problems], most=MAX_SHOWN)
    return DataError(text + TO_DOWNLOAD if IS_URL in text else text)


class Source(NamedTuple):
    name: str
    weight: float = 1.0  # how often each of its examples appears in an epoch

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}={self.weight:g}"


def parse_sources(data: str | Sequence[str]) -> list[Source]:
    """Returns the sources in texts like `a.jsonl=2` and `b.jsonl`, with their weights. Raises DataError.

    If a file with the full text as its name exists, such as `lr=2`, it is used.
    """
    sources = []
    for text in [data] if isinstance(data, str) else data:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            name = ""
        if not name or Path(text).expanduser().exists():
            sources.append(Source(text))
        elif math.isfinite(weight) and weight > 0:
            sources.append(Source(name, weight))
        else:
            raise DataError(
                f"data {text}: expected a weight above 0, such as {name}=0.5; to exclude a source, remove it"
            )
    if repeated := _repeated(source.name for source in sources):
        raise DataError(f"data {repeated} appears twice; list it once, as SOURCE=WEIGHT")
    return sources


def source_names(data: str | Sequence[str]) -> list[str]:
    return [source.name for source in parse_sources(data)]


def read_rows(source: str, *, split: str = "train", streaming: bool = False) -> Rows:
    """Yields the rows of `source` in order, and a RowProblem for each row that cannot be read.

    split: the part of a folder or Hub dataset, unless the source names one: `owner/name[test]`. In a folder, the file
        names decide.
    streaming: read Hub data while it is used instead of downloading it first. Files are always read while used.
    Raises DataError if the source does not exist.
    """
    check_data_exists(source)
    path = Path(source).expanduser()
    if not path.exists() and (match := WITH_SPLIT.fullmatch(source)):
        return read_rows(match["source"], split=match["split"], streaming=streaming)
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    return read_hub(source, split, streaming)


def check_data_exists(source: str) -> None:
    """Raises DataError if `source` is not a readable file, a folder or a Hub id. Does not contact the Hub."""
    path = Path(source).expanduser()
    if not path.exists() and (match := WITH_SPLIT.fullmatch(source)):
        check_data_exists(match["source"])
    elif path.is_file() and path.suffix.lower() not in READERS:
        suffix = path.suffix or "(no suffix)"
        raise DataError(f"data {path}: unknown file type {suffix}; expected one of {', '.join(READERS)}")
    elif not path.exists():
        hint = nearest_path(path)
        if hint or path.suffix.lower() in READERS or not HUB_ID.fullmatch(source):
            raise DataError(
                f"data {source}: no such file or folder{hint or '; use a path, or a Hub id such as owner/name'}"
            )


def _read_folder(folder: Path, split: str) -> Rows:
    if any((folder / name).exists() for name in SAVED_BY_DATASETS):
        return read_saved(folder, split)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in READERS and path.is_file())
    # A README.txt next to data files is not data.
    files = [path for path in files if path.suffix.lower() != TXT] or files
    if not files:
        raise DataError(f"data {folder}: the folder has no data files; expected one of {', '.join(READERS)}")
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    # all files if no name contains a split
    chosen = [path for path in files if splits[path] == split] if any(splits.values()) else files
    if not chosen:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:10])
        raise DataError(f"data {folder}: no file for split {split!r}; found {names}; rename one, or name a file")
    return (row for path in chosen for row in read_file(path))


def _split_of(path: Path) -> str | None:
    """Returns the split that a word of the path names: train.jsonl, squad_train-00000-of-2.parquet, test/2024/x.csv."""
    for name in (path.stem, *reversed(path.parent.parts)):
        if match := re.search(r"(?<![a-z])(train|val|dev|eval|test)(ing|id|idation|uation)?(?![a-z])", name.lower()):
            return match[1] if match[1] in ("train", "test") else "validation"
    return None


# ---- Files: JSON lines, JSON, CSV, Parquet, text


def read_file(path: Path) -> Rows:
    """Yields the rows of one file, by its suffix. A file that cannot be opened becomes a RowProblem."""
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        yield RowProblem(str(path), 0, error.strerror or str(error))


def read_jsonl(path: Path) -> Rows:
    """Reads one JSON object per line, or a list of objects, as in a .json file; skips blank lines."""
    with path.open("rb") as file:
        first = next(filter(bytes.strip, file), b"").decode("utf-8-sig", "replace")
        file.seek(0)
        yield from read_json(path) if first.lstrip().startswith("[") else read_json_lines(path, file)


def read_json_lines(path: Path, lines: Iterable[bytes]) -> Rows:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line.decode("utf-8-sig").rstrip(), object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                yield RowProblem(str(path), number, _json_cause(error), content=line.decode(errors="replace"))
            else:
                yield _row(path, number, value)


def read_json(path: Path) -> Rows:
    """Reads a list of objects, an object that contains one such list, or JSON lines in a .json file."""
    try:
        value = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            with path.open("rb") as file:
                yield from read_json_lines(path, file)
        else:
            where = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
            yield RowProblem(str(path), 0, f"{where}{_json_cause(error)}")
    else:
        items = value if isinstance(value, list) else [value]
        if isinstance(value, dict) and len(value) == 1:
            (inner,) = value.values()
            turn_keys = ("role", "from")  # a list of turns is a single conversation, so one row
            if isinstance(inner, list) and all(isinstance(i, dict) and not i.keys() & turn_keys for i in inner):
                items = inner
        for number, item in enumerate(items, 1):
            yield _row(path, number, item, is_item=True)


def _repeated(names: Iterable[str]) -> str:
    return ", ".join(sorted(name for name, count in Counter(names).items() if count > 1))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"an object has {_repeated(key for key, _ in pairs)} twice; keep only one")
    return fields


def _json_cause(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(error)
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return f"unreadable JSON: {error}"  # a number with thousands of digits


def _row(path: Path, number: int, value: Any, is_item: bool = False) -> Row | RowProblem:
    if isinstance(value, dict):
        return Row(str(path), number, value, is_item)
    cause = f"expected a JSON object {{...}}, got {value_type(value)}"
    return RowProblem(str(path), number, cause, is_item, content=value)


def read_csv(path: Path, delimiter: str = ",") -> Rows:
    """Reads separated values with column names in the first line. The number of a row is its last line.

    delimiter: the default; any of DELIMITERS that splits the first line into more columns is preferred.
    """
    csv.field_size_limit(MAX_FIELD)  # a global setting of Python
    with path.open("rb") as file:
        first = file.readline().decode("utf-8-sig", errors="replace").partition("\r")[0]
        columns = {other: len(next(csv.reader([first], delimiter=other), [])) for other in (delimiter, *DELIMITERS)}
        delimiter = max(columns, key=lambda other: columns[other])  # the first one if tied
        file.seek(0)
        reader = csv.reader((line.decode("utf-8-sig") for line in file), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if repeated := _repeated(header):
                yield RowProblem(str(path), 0, f"duplicate columns {repeated} in the header; rename all but one")
                return
            for values in reader:
                if values and len(values) == len(header):
                    yield Row(str(path), reader.line_num, dict(zip(header, values, strict=True)))
                elif values:
                    cause = f"expected {len(header)} values separated by {DELIMITERS[delimiter]}, as in the header"
                    yield RowProblem(str(path), reader.line_num, f"{cause}, got {len(values)}", content=values)
        except UnicodeDecodeError as error:
            yield RowProblem(str(path), 0, f"line {reader.line_num + 1}: {_not_utf8(error)}")
        except csv.Error as error:
            yield RowProblem(str(path), 0, f"line {reader.line_num}: not CSV: {error}")


def read_parquet(path: Path) -> Rows:
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)  # rows with images may be large
        if repeated := _repeated(file.schema_arrow.names):
            yield RowProblem(str(path), 0, f"duplicate columns {repeated}; rename all but one")
            return
        for batch in file.iter_batches(ARROW_ROWS):
            yield from _arrow_rows(str(path), number, batch)
            number += len(batch)
    except pyarrow.ArrowException as error:
        yield RowProblem(str(path), 0, f"not Parquet: {str(error).splitlines()[0]}")


def _arrow_rows(file: str, number: int, batch: Any) -> Rows:
    """Yields the rows of a batch or table. number: of rows before it."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date after the year 9999
        if len(batch) == 1:
            yield RowProblem(file, number + 1, f"unreadable value ({error}); repair it, or remove its column", True)
            return
        for index in range(len(batch)):
            yield from _arrow_rows(file, number + index, batch.slice(index, 1))
        return
    for index, fields in enumerate(rows, number + 1):
        yield Row(file, index, {key: _without_nulls(value) for key, value in fields.items()}, is_item=True)


def _without_nulls(value: Any) -> Any:
    """In Arrow, all objects in a column have the same keys, so a tool call also has the arguments of other tools."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _not_utf8(error: UnicodeDecodeError) -> str:
    encoding = "UTF-16" if error.object.startswith((b"\xff\xfe", b"\xfe\xff")) else "WINDOWS-1252"
    return (
        f"not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; if the text is from Windows, convert it "
        f"with `iconv -f {encoding} -t UTF-8 OLD > NEW`"
    )


def read_text(path: Path) -> Rows:
    """Reads the whole file as one row."""
    try:
        yield Row(str(path), 1, {"text": path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")})
    except UnicodeDecodeError as error:
        yield RowProblem(str(path), 0, _not_utf8(error))


TXT = ".txt"
JSON_LINES = (".jsonl", ".ndjson")
READERS: dict[str, Callable[[Path], Rows]] = {
    **dict.fromkeys(JSON_LINES, read_jsonl),
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    TXT: read_text,
}

# ---- Hugging Face datasets


def read_hub(source: str, split: str, streaming: bool) -> Rows:
    """Yields the rows of the Hub dataset `owner/name` or `owner/name:configuration`. Raises DataError."""
    import datasets

    name, _, configuration = source.partition(":")
    with _datasets_errors(source, name):
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
        yield from _undecoded(f"{source}[{split}]", rows)


def read_saved(folder: Path, split: str) -> Rows:
    """Yields the rows of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`. Raises DataError."""
    import datasets

    with _datasets_errors(str(folder), str(folder)):
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, dict) and split not in saved:
            raise DataError(f"data {folder}: no split {split!r}; found {', '.join(saved)}{nearest(split, saved)}")
        rows = saved[split] if isinstance(saved, dict) else saved
        yield from _undecoded(str(folder), rows)


def _undecoded(file: str, rows: Any) -> Rows:
    """Yields the rows as Arrow stores them: images as {"bytes", "path"}, which `datasets` would decode."""
    number = 0
    for table in rows.with_format("arrow").iter(ARROW_ROWS):
        yield from _arrow_rows(file, number, table)
        number += len(table)


@contextmanager
def _datasets_errors(source: str, name: str) -> Iterator[None]:
    """Converts errors of `datasets` and the Hub client into a DataError with a remedy."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except ConnectionError:
        raise DataError(
            f"data {source}: no such local file or folder, and the Hub cannot be reached (no network, a proxy, or "
            "HF_HUB_OFFLINE); use a file or folder instead, or download the data on a connected machine with "
            f"`hf download --repo-type dataset {name} --local-dir FOLDER` and use FOLDER"
        ) from None
    except DataError:
        raise
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError, OverflowError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise DataError(
            f"data {source}: {cause}; select a configuration with owner/name:configuration, or a split with "
            "owner/name[split]"
        ) from None
