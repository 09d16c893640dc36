"""Readers of single files: JSON lines, JSON, CSV, Parquet. Each yields rows, and faults for what it cannot read."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tailora.data.rows import Fault, Row

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
