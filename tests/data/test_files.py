import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tailora.data.readers import Row, RowProblem, data_error, read_file

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": 'c, "d"\n', "completion": "ü"}]


def write_jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS))


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def write_wrapped(path: Path) -> None:
    path.write_text(json.dumps({"data": ROWS}))


def write_csv(path: Path) -> None:
    path.write_text('\ufeffprompt,completion\na,b\n"c, ""d""\n",ü\n', newline="")


def write_tsv(path: Path) -> None:
    path.write_text('prompt\tcompletion\na\tb\n"c, ""d""\n"\tü\n', newline="")


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def test_a_csv_field_may_be_of_any_length_and_the_csv_module_stays_as_it_is(tmp_path: Path) -> None:
    before, long = csv.field_size_limit(), "x" * 200_000
    (tmp_path / "long.csv").write_text(f"text\n{long}\nshort\n")
    rows = read_file(tmp_path / "long.csv")
    first = next(rows)
    assert csv.field_size_limit() == before
    assert [row.fields["text"] for row in (first, *rows) if isinstance(row, Row)] == [long, "short"]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "write", "numbers"),
    [
        ("a.jsonl", write_jsonl, [1, 3]),
        ("a.JSONL", write_jsonl, [1, 3]),
        ("a.ndjson", write_jsonl, [1, 3]),
        ("a.json", write_json, [1, 2]),
        ("wrapped.json", write_wrapped, [1, 2]),
        ("lines.json", write_jsonl, [1, 3]),
        ("a.csv", write_csv, [2, 4]),
        ("a.tsv", write_tsv, [2, 4]),
        ("a.parquet", write_parquet, [1, 2]),
    ],
)
def test_every_form_gives_the_same_rows(tmp_path: Path, name, write, numbers) -> None:
    path = tmp_path / name
    write(path)
    assert list(read_file(path)) == [
        Row(str(path), number, fields) for number, fields in zip(numbers, ROWS, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "content", "number", "cause"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', 2, "not JSON: Expecting value at column 9"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 2, "not UTF-8: byte 10 is 0xff"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', 2, "a JSON list where an object {...} is needed"),
        ("a.jsonl", b'{"text": "a"}\n{"n": ' + b"9" * 5000 + b"}\n", 2, "not JSON that can be read: Exceeds the limit"),
        ("a.jsonl", b"[" * 100_000, 1, "not JSON that can be read: maximum recursion depth"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', 2, "not JSON: Expecting ':' delimiter at column 9"),
        ("a.json", b'["x"]', 1, "a JSON str where an object {...} is needed"),
        ("a.json", b'"\xff"', 0, "not UTF-8: byte 1 is 0xff"),
        ("a.csv", b"prompt,completion\na,b,c\n", 2, "3 values where the header names 2 columns"),
        ("a.csv", b"prompt,completion\na\n", 2, "1 values where the header names 2 columns"),
        ("a.csv", b"prompt,prompt\na,b\n", 1, "the header names prompt more than once"),
        ("a.csv", b'prompt\n"a', 2, "not CSV: unexpected end of data"),
        ("a.csv", b"prompt\na\n\xff\n", 3, "not UTF-8: byte 0 is 0xff"),
        ("a.parquet", b"not a table", 0, "not Parquet: Parquet magic bytes not found"),
    ],
)
def test_what_cannot_be_read_is_named_with_file_row_and_cause(tmp_path: Path, name, content, number, cause) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (fault,) = [item for item in read_file(path) if isinstance(item, RowProblem)]
    assert (fault.file, fault.number) == (str(path), number)
    assert cause in fault.cause


def test_good_lines_around_a_bad_one_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nbad\n{"text": "b"}\nworse\n')
    assert [type(item) for item in read_file(path)] == [Row, RowProblem, Row, RowProblem]


def test_one_conversation_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path.write_text(json.dumps(row))
    assert list(read_file(path)) == [Row(str(path), 1, row)]


def test_a_file_that_cannot_be_opened_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    assert list(read_file(path)) == [RowProblem(str(path), 0, "No such file or directory")]


def test_a_refusal_shows_twenty_faults_and_counts_the_rest() -> None:
    text = str(data_error([RowProblem("a.jsonl", number, "bad") for number in range(1, 26)]))
    assert text.startswith("25 problems:\n  - a.jsonl:1: bad\n")
    assert text.endswith("  - a.jsonl:20: bad\n  and 5 more")
