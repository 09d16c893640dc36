"""Atomic writing, and safetensors."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tailora.core.cache import cache_folder
from tailora.errors import FormatError, WriteError
from tailora.formats.io import read_safetensors, replace_folder, safetensors_bytes, write_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "file", b"one")
    write_file(tmp_path / "deep" / "file", b"two")
    assert (tmp_path / "deep" / "file").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_a_new_folder_replaces_the_old_one_and_an_error_leaves_it(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def replace(name: str, error: type[Exception] | None = None) -> None:
        with replace_folder(target) as fresh:
            (fresh / name).write_text(name)
            if error is not None:
                raise error

    for name in ("old", "new"):
        replace(name)
    with pytest.raises(ZeroDivisionError):
        replace("half", ZeroDivisionError)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"")
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode


def test_a_writer_that_is_killed_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_file(target, b"old" * 1000)
    script = (
        "import sys; from pathlib import Path; from tailora.formats.io import write_file\n"
        "print('go', flush=True)\n"
        "while True: write_file(Path(sys.argv[1]), b'new' * 1_000_000)"
    )
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert target.read_bytes() in (b"old" * 1000, b"new" * 1_000_000)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights"),
        Exception("No space left on device (os error 28)"),  # as tokenizers, written in Rust, raises it
    ],
)
def test_a_full_disk_is_reported_for_the_requested_folder(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(WriteError) as caught, replace_folder(tmp_path / "out"):
        raise error
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'out'}: No space left on device; "
        "free some space, or use a folder on a different disk"
    )
    assert not list(tmp_path.iterdir())


def test_a_file_cannot_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=r"cannot write .*folder: Is a directory; use a different path"):
        write_file(tmp_path / "folder", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("metadata", [{}, {"b": "1", "a": "2"}])
@pytest.mark.parametrize("tensors", [{}, {"x": torch.arange(3.0), "a": torch.ones(2, 2)}])
def test_tensors_and_metadata_are_read_back(
    tensors: dict[str, Tensor], metadata: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(safetensors_bytes(tensors, metadata))
    found, notes = read_safetensors(path)
    assert notes == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_metadata_is_sorted() -> None:
    metadata = {str(number): "" for number in range(20)}
    assert len({safetensors_bytes({}, dict(reversed(metadata.items()))), safetensors_bytes({}, metadata)}) == 1
    assert list(json.loads(safetensors_bytes({}, metadata)[8:])["__metadata__"]) == sorted(metadata)


def test_tensors_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    """So that an adapter that is read and written again has the same bytes."""
    names = [f"layers.{number}.weight" for number in range(40)]
    (tmp_path / "file").write_bytes(safetensors_bytes({name: torch.zeros(1) for name in names}, {}))
    assert list(read_safetensors(tmp_path / "file")[0]) == sorted(names)


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


def header_and_bytes(dtype: str, size: int) -> bytes:
    header = json.dumps({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.mark.parametrize(("dtype", "size"), [("F4", 4), ("F6_E2M3", 6), ("nonsense", 8)])
def test_types_that_torch_cannot_read_are_refused(tmp_path: Path, dtype: str, size: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(header_and_bytes(dtype, size))
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        read_safetensors(tmp_path / "x.safetensors")


def test_tensors_stay_when_their_file_shrinks(tmp_path: Path) -> None:
    save_file({"x": torch.ones(10**5)}, tmp_path / "x.safetensors", {"a": "b"})
    tensors, metadata = read_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert tensors["x"].sum() == 10**5
    assert metadata == {"a": "b"}


def test_nothing_is_kept_of_a_file_that_was_read(tmp_path: Path) -> None:
    save_file({str(number): torch.ones(2) for number in range(500)}, tmp_path / "x.safetensors")
    read_safetensors(tmp_path / "x.safetensors")
    before = sys.getallocatedblocks()
    for _ in range(10):
        read_safetensors(tmp_path / "x.safetensors")
    # safe_open keeps about 7,000, for its two numbers of each tensor. Threads of other tests may add a few hundred
    assert sys.getallocatedblocks() - before < 2000
