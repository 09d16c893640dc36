import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from tailora.data.readers import read_hub, read_rows
from tailora.errors import DataError


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


def test_a_missing_split_is_named_with_the_files_there_are(folder: Path) -> None:
    (folder / "test" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file for the split 'test'; there are train.jsonl, validation-0"):
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
    with pytest.raises(DataError, match=r"no split 'tests'; did you mean test\?; there are train, test"):
        texts(str(tmp_path / "two"), split="tests")


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch) -> str:
    """A folder that `datasets` reads as it reads a Hub repository; its cache stays in the test."""
    (folder / "test" / "test.jsonl").unlink()
    (folder / "test").rmdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_through_datasets_at_once_or_streamed(hub: str, streaming: bool) -> None:
    rows = list(read_hub(hub, "validation", streaming))
    assert [(row.file, row.number) for row in rows] == [(f"{hub}[validation]", 1)]
    assert rows[0].fields["text"].startswith("validation")


def test_a_split_that_datasets_does_not_know_is_no_traceback(hub: str) -> None:
    with pytest.raises(DataError, match=r"(?s)Unknown split \"nosuch\".*a split as owner/name\[split\]"):
        list(read_hub(hub, "nosuch", False))


def test_an_unreachable_hub_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"data owner/name:some: no such file .* the Hub cannot be reached .*hf download"
    ):
        list(read_rows("owner/name:some"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{folder}/trian.jsonl", r"no such file or folder.*; did you mean train.jsonl\?"),
        ("{folder}/tset", r"did you mean test\?"),
        ("nowhere.jsonl", "no such file or folder"),
        ("not an id", "no such file or folder"),
        ("{folder}/README.md", r"the form .md is unknown; readable are .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
        ("{folder}/empty", "the folder holds no data file; readable are"),
    ],
)
def test_a_source_that_is_none_is_refused_with_what_there_is(folder: Path, source: str, said: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        read_rows(source.format(folder=folder))
