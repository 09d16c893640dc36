import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tailora.errors import WriteError
from tailora.formats.io import replace_folder, write_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "file", b"one")
    write_file(tmp_path / "deep" / "file", b"two")
    assert (tmp_path / "deep" / "file").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_an_error_leaves_the_old_folder_and_no_half_of_a_new_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with replace_folder(target) as fresh:
        (fresh / "a").write_text("old")

    def fail() -> None:
        with replace_folder(target) as fresh:
            (fresh / "a").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("old", "new"):
        with replace_folder(target) as fresh:
            (fresh / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_get_the_modes_that_the_umask_leaves(tmp_path: Path) -> None:
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
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert target.read_bytes() in (b"old" * 1000, b"new" * 1_000_000)


def test_a_full_disk_is_told_of_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught, replace_folder(tmp_path / "out") as fresh:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(fresh / "weights"))
    assert str(caught.value) == (
        f"{tmp_path / 'out'} cannot be written: No space left on device; "
        "free some space, or give a folder on another disk"
    )
    assert not list(tmp_path.iterdir())


def test_a_file_cannot_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="folder cannot be written: Is a directory; give another path"):
        write_file(tmp_path / "folder", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
