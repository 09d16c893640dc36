"""Rows of files, folders, saved data sets and the Hub, and the problems of those that cannot be read."""

import json
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from tailora.data.readers import (
    Row,
    RowProblem,
    Source,
    _split_of,
    data_error,
    parse_sources,
    read_file,
    read_hub,
    read_rows,
)
from tailora.errors import DataError

# ---- Files

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": 'c, "d"\n', "completion": "ü"}]


LINES = "\n\n".join(json.dumps(row) for row in ROWS)
CSV = '\ufeffprompt,completion\na,b\n"c, ""d""\n",ü\n'
TSV = 'prompt\tcompletion\na\tb\n"c, ""d""\n"\tü\n'


def test_a_csv_field_can_have_any_length(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"text\n{'x' * 200_000}\nshort\n")
    assert [row.fields["text"] for row in read_rows(str(tmp_path / "long.csv"))] == ["x" * 200_000, "short"]


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", LINES, [1, 3]),
        ("a.JSONL", LINES, [1, 3]),
        ("a.ndjson", LINES, [1, 3]),
        ("a.json", json.dumps(ROWS, indent=1), [1, 2]),
        ("list.jsonl", "\ufeff  " + json.dumps(ROWS, indent=1), [1, 2]),
        ("wrapped.json", json.dumps({"data": ROWS}), [1, 2]),
        ("lines.json", LINES, [1, 3]),
        ("a.csv", CSV, [2, 4]),
        ("a.tsv", TSV, [2, 4]),
        ("a.parquet", "", [1, 2]),
    ],
)
def test_every_file_type_gives_the_same_rows(tmp_path: Path, name: str, content: str, numbers: list[int]) -> None:
    path = tmp_path / name
    if content:
        path.write_text(content, newline="")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    is_item = name in ("a.json", "list.jsonl", "wrapped.json", "a.parquet")
    assert list(read_file(path)) == [
        Row(str(path), number, fields, is_item) for number, fields in zip(numbers, ROWS, strict=True)
    ]
    problem = next(read_file(path)).problem("bad")
    assert str(problem) == (f"{path}, item 1: bad" if is_item else f"{path}:{numbers[0]}: bad")


@pytest.mark.parametrize(
    ("name", "content", "number", "cause"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', 2, "not JSON: Expecting value at column 9"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 2, "not UTF-8: byte 10 is 0xff"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', 2, "expected a JSON object {...}, got a list"),
        ("a.jsonl", b'{"text": "a"}\n{"n": ' + b"9" * 5000 + b"}\n", 2, "unreadable JSON: Exceeds the limit"),
        ("a.jsonl", b"[" * 100_000, 0, "unreadable JSON: maximum recursion depth"),
        ("a.jsonl", b'[1]\n{"text": "a"}', 1, "expected a JSON object {...}, got a list"),
        ("a.jsonl", b'{"a": [{"b": 1, "c": 2, "b": 3}]}', 1, "unreadable JSON: an object has b twice; keep only one"),
        ("a.json", b'[{"text": "a"}, {"text": "a", "text": "b"}]', 0, "an object has text twice"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', 0, "line 2: not JSON: Expecting ':' delimiter at column 9"),
        ("a.json", b'["x"]', 1, "expected a JSON object {...}, got a string"),
        ("a.json", b'"\xff"', 0, "not UTF-8: byte 1 is 0xff"),
        ("a.csv", b"prompt,completion\na,b,c\n", 2, "expected 2 values separated by commas, as in the header, got 3"),
        ("a.csv", b"prompt,completion\na\n", 2, "expected 2 values separated by commas, as in the header, got 1"),
        ("a.csv", b"prompt,prompt\na,b\n", 0, "duplicate columns prompt in the header; rename all but one"),
        ("a.csv", b'prompt\n"a', 0, "line 2: not CSV: unexpected end of data"),
        ("a.csv", b"prompt\na\n\xff\n", 0, "line 3: not UTF-8: byte 0 is 0xff"),
        ("a.csv", "prompt\nnaïve\n".encode("cp1252"), 0, "from Windows, convert it with `iconv -f WINDOWS-1252"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), 1, "0 is 0xff; if the text is from Windows, convert it with"),
        ("a.csv", "text\na\n".encode("utf-16"), 0, "`iconv -f UTF-16 -t UTF-8"),
        ("a.txt", b"\xff", 0, "not UTF-8: byte 0 is 0xff"),
        ("a.jsonl", b"\0" * 100, 1, "not JSON"),
        ("a.jsonl", b'{"text": "a"}{"text": "b"}', 1, "not JSON: Extra data"),
        ("a.csv", b"a;b\n1;2;3\n", 2, "expected 2 values separated by semicolons, as in the header, got 3"),
        ("a.parquet", b"not a table", 0, "not Parquet: Parquet magic bytes not found"),
    ],
)
def test_an_unreadable_row_is_named_with_file_number_and_cause(tmp_path: Path, name, content, number, cause) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (problem,) = [item for item in read_file(path) if isinstance(item, RowProblem)]
    assert (problem.file, problem.number) == (str(path), number)
    assert cause in problem.cause


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_the_one_that_makes_most_columns(tmp_path: Path, bom, suffix: str, delimiter: str) -> None:
    path = tmp_path / f"a{suffix}"
    lines = [["prompt", "completion"], ["hello, world; or | so", "é"]]
    path.write_bytes(
        bom
        + "".join(f"{delimiter.join(f'{chr(34)}{value}{chr(34)}' for value in line)}\r\n" for line in lines).encode()
    )
    assert list(read_file(path)) == [Row(str(path), 2, {"prompt": "hello, world; or | so", "completion": "é"})]


def test_arguments_of_tool_calls_keep_only_their_own_keys_in_arrow(tmp_path: Path) -> None:
    """A column of objects has the keys of all of them, and null where one has none."""
    rows = [{"text": None, "calls": [{"arguments": arguments}]} for arguments in ({"city": "Rome"}, {"day": 1})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in ("a.parquet", "saved"):
        assert [row.fields for row in read_rows(str(tmp_path / source)) if isinstance(row, Row)] == rows
    (tmp_path / "a.jsonl").write_text('{"arguments": {"day": null}}')
    assert [row.fields for row in read_rows(str(tmp_path / "a.jsonl"))] == [{"arguments": {"day": None}}]


def bad_utf8() -> pyarrow.Array:
    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        ({"text": bad_utf8()}, "'utf-8' codec can't decode"),
        ({"text": ["a", "b"], "at": pyarrow.array([0, 10**15], pyarrow.timestamp("s"))}, "Python int too large"),
    ],
)
def test_values_of_parquet_that_python_cannot_hold_are_problems_of_their_row(
    tmp_path: Path, columns, cause: str
) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    first, problem = read_file(path)
    assert first.fields["text"] == "a"
    assert str(problem).startswith(f"{path}, item 2: unreadable value ({cause}")


def test_columns_of_the_same_name_are_refused_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    assert list(read_file(path)) == [RowProblem(str(path), 0, "duplicate columns text; rename all but one")]


def test_one_conversation_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path.write_text(json.dumps(row))
    assert list(read_file(path)) == [Row(str(path), 1, row, is_item=True)]


def test_a_file_that_cannot_be_opened_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    assert list(read_file(path)) == [RowProblem(str(path), 0, "No such file or directory")]


def test_an_error_shows_twenty_problems_and_counts_the_rest() -> None:
    text = str(data_error([RowProblem("a.jsonl", number, "bad") for number in range(1, 26)]))
    assert text.startswith("25 problems:\n  - a.jsonl:1: bad\n")
    assert text.endswith("  - a.jsonl:20: bad\n  - and 5 more")


# ---- Folders and Hugging Face data sets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file per split, one of them in a folder of its own, and a file that is no data."""
    for name in ("train.jsonl", "validation-00000-of-00001.jsonl", "test/test.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}))
    (tmp_path / "data" / "README.md").touch()
    return tmp_path / "data"


def texts(source: str, **options) -> list[str]:
    return [row.fields["text"] for row in read_rows(source, **options)]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_files_of_a_split_are_known_by_their_names(folder: Path, split: str) -> None:
    assert [text.startswith(split) for text in texts(str(folder), split=split)] == [True]
    assert texts(f"{folder}[{split}]") == texts(str(folder), split=split)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("squad_train.jsonl", "train"),
        ("val.jsonl", "validation"),
        ("test/2024/a.jsonl", "test"),
        ("evaluation-1.csv", "validation"),
        ("contest.jsonl", None),
    ],
)
def test_a_split_is_a_word_of_the_path(name: str, split: str | None) -> None:
    assert _split_of(Path(name)) == split


def test_a_missing_split_is_named_with_the_files_in_the_folder(folder: Path) -> None:
    (folder / "test" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file for split 'test'; found train.jsonl, validation-0"):
        read_rows(str(folder), split="test")


def test_files_that_name_no_split_are_read_together_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "trains.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert texts(str(tmp_path)) == ["a.jsonl", "b.jsonl", "trains.jsonl"]


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    assert texts(str(tmp_path / "one")) == ["a", "b"]
    assert texts(str(tmp_path / "two[test]")) == ["b"]
    with pytest.raises(DataError, match=r"no split 'tests'; found train, test; did you mean test\?"):
        texts(str(tmp_path / "two"), split="tests")


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffhello\r\n\r\nyou é".encode())
    assert list(read_file(path)) == [Row(str(path), 1, {"text": "hello\n\nyou é"})]


def test_text_files_are_data_where_no_other_is(folder: Path, tmp_path: Path) -> None:
    (folder / "train.txt").write_text("a note on the data")
    assert texts(str(folder)) == ["train.jsonl"]
    for name in ("b/2.txt", "a.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(name)
    assert texts(str(tmp_path / "texts")) == ["a.txt", "b/2.txt"]


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ("a.jsonl", [Source("a.jsonl")]),
        (["a.jsonl=2", "b.jsonl"], [Source("a.jsonl", 2), Source("b.jsonl")]),
        (["owner/name[test]=0.5", "demo=1e1"], [Source("owner/name[test]", 0.5), Source("demo", 10)]),
        ("lr=a,b.jsonl", [Source("lr=a,b.jsonl")]),
        (["{folder}/r=2", "{folder}/r=2=3"], [Source("{folder}/r=2"), Source("{folder}/r=2", 3)]),
    ],
)
def test_a_number_after_the_last_equals_sign_is_a_weight_unless_a_file_has_that_name(
    tmp_path: Path, data: str | list[str], sources: list[Source]
) -> None:
    (tmp_path / "r=2").touch()
    if "{folder}/r=2=3" in data:  # the same source twice
        with pytest.raises(DataError, match=r"r=2 appears twice; list it once, as SOURCE=WEIGHT"):
            parse_sources([text.format(folder=tmp_path) for text in data])
        data, sources = data[1], sources[1:]
    given = data.format(folder=tmp_path) if isinstance(data, str) else [text.format(folder=tmp_path) for text in data]
    assert parse_sources(given) == [Source(name.format(folder=tmp_path), weight) for name, weight in sources]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_is_above_0(weight: str) -> None:
    with pytest.raises(DataError, match=f"data a.jsonl={weight}: expected a weight above 0, such as a.jsonl=0.5"):
        parse_sources(f"a.jsonl={weight}")


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch) -> str:
    """A folder that `datasets` reads as it reads a Hub repository; its cache stays in the test."""
    (folder / "test" / "test.jsonl").unlink()
    (folder / "test").rmdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_rows_at_once_or_streamed(hub: str, streaming: bool) -> None:
    rows = list(read_hub(hub, "validation", streaming))
    assert [(row.file, row.number) for row in rows] == [(f"{hub}[validation]", 1)]
    assert rows[0].fields["text"].startswith("validation")


def test_an_unknown_split_of_a_data_set_is_refused(hub: str) -> None:
    with pytest.raises(DataError, match=r"(?s)Unknown split \"nosuch\".*a split with owner/name\[split\]"):
        list(read_hub(hub, "nosuch", False))


def test_an_unreachable_hub_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"data owner/name:some: no such local file .* the Hub cannot be reached .*hf download"
    ):
        list(read_rows("owner/name:some"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}/trian.jsonl", r"no such file or folder.*; did you mean train.jsonl\?"),
        ("{folder}/tset", r"did you mean test\?"),
        ("nowhere.jsonl", "no such file or folder"),
        ("not an id", "no such file or folder"),
        (
            "{folder}/README.md",
            r"unknown file type .md; expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt",
        ),
        ("{folder}/empty", "the folder has no data files; expected one of"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_with_suggestions(folder: Path, source: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        read_rows(source.format(folder=folder))
