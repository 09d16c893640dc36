"""Tensors on disk: what is whole is found again, what is not is absent."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tailora.errors import WriteError
from tailora.kernels.store import Store, make_room

ROOM = 10**6


Open = Callable[..., Store]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:

        def make(folder: Path, limit: int = ROOM, said: list[str] | None = None, fill: int = 0) -> Store:
            store = Store(folder, {"for": "a test"}, limit, (said if said is not None else []).append)
            stack.callback(store.close)
            for number in range(fill):
                store.write(number, tensor(number))
            return store

        yield make


def tensor(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3 + number, 5, generator=torch.Generator().manual_seed(number)).to(dtype)


def found(store: Store, number: int, dtype: torch.dtype = torch.float32) -> bool:
    into = torch.empty_like(tensor(number, dtype))
    there = store.read(number, into)
    assert not there or torch.equal(into, tensor(number, dtype))
    return there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_was_written_is_read_by_the_writer_and_by_a_later_store(
    opened: Open, tmp_path: Path, dtype: torch.dtype
) -> None:
    store = opened(tmp_path)
    for number in (7, 0, 3):
        store.write(number, tensor(number, dtype))
        assert found(store, number, dtype)
    store.close()
    assert found(store, 0, dtype)  # opened again
    later = opened(tmp_path)
    assert [number for number in range(9) if number in later] == [0, 3, 7]
    assert all(found(later, number, dtype) for number in (0, 3, 7))
    assert not found(later, 1, dtype)


def test_two_at_once_write_apart_and_read_each_other(opened: Open, tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    for number in range(6):
        (one, two)[number % 2].write(number, tensor(number))
    one.write(5, tensor(5))  # both have it
    one.refresh()
    two.refresh()
    assert all(found(store, number) for store in (one, two) for number in range(6))
    assert len(list(tmp_path.glob("*.states"))) == 2


@pytest.mark.parametrize("cut", [1, 10, 30])
@pytest.mark.parametrize("kind", ["index", "states"])
def test_what_a_killed_process_left_half_written_is_absent(opened: Open, tmp_path: Path, kind: str, cut: int) -> None:
    opened(tmp_path, fill=4).close()
    (path,) = tmp_path.glob(f"*.{kind}")
    os.truncate(path, path.stat().st_size - cut)
    store = opened(tmp_path)
    assert [found(store, number) for number in range(4)][:3] == [True, True, cut < 30 or kind == "states"]
    assert not found(store, 3)
    store.write(3, tensor(3))
    assert found(store, 3)
    assert found(opened(tmp_path), 3)


def test_damaged_bytes_are_absent_and_can_be_written_again(opened: Open, tmp_path: Path) -> None:
    opened(tmp_path, fill=4).close()
    (path,) = tmp_path.glob("*.states")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    store = opened(tmp_path)
    assert [found(store, number) for number in range(4)] == [False, True, True, True]
    store.write(0, tensor(0))
    assert found(store, 0)


def test_a_tensor_of_another_size_is_absent(opened: Open, tmp_path: Path) -> None:
    store = opened(tmp_path, fill=4)
    assert not store.read(2, torch.empty(1, 5))


def test_lines_that_no_store_wrote_are_passed_over(opened: Open, tmp_path: Path) -> None:
    opened(tmp_path, fill=4).close()
    (tmp_path / "other.index").write_bytes(b"what\n0 0 12 zzzzzzzz\n9 0 60 00000000\n-1 0 0 00000000\n")
    store = opened(tmp_path)
    assert all(found(store, number) for number in range(4))
    assert not found(store, 9)


def test_files_removed_meanwhile_are_absent(opened: Open, tmp_path: Path) -> None:
    opened(tmp_path, fill=4).close()
    store = opened(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    assert not found(store, 0)
    store.refresh()
    store.write(1, tensor(1))
    store.write(0, tensor(0))
    assert found(store, 0)


def test_clear_removes_everything_and_goes_on(opened: Open, tmp_path: Path) -> None:
    store = opened(tmp_path, fill=4)
    store.clear()
    assert len(store) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]
    store.write(2, tensor(2))
    assert found(store, 2)


def test_beyond_the_limit_nothing_is_written_and_it_is_said_once(opened: Open, tmp_path: Path) -> None:
    said: list[str] = []
    store = opened(tmp_path, limit=200, said=said)  # 60, 80, 100 bytes
    for number in range(4):
        store.write(number, tensor(number))
    assert [found(store, number) for number in range(4)] == [True, True, False, False]
    (text,) = said
    assert "200 bytes" in text
    again = opened(tmp_path, limit=200)  # what others wrote counts
    again.write(2, tensor(2))
    assert not found(again, 2)


def test_a_folder_that_cannot_be_made_is_an_error(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="is a file, not a folder"):
        opened(tmp_path / "file" / "store")


def test_room_is_made_by_removing_what_was_used_longest_ago(opened: Open, tmp_path: Path) -> None:
    for place, name in enumerate(["old", "own", "middle", "new"]):
        opened(tmp_path / name, fill=4).close()
        os.utime(tmp_path / name / "about.json", (place, place))
    each = sum(path.stat().st_size for path in (tmp_path / "old").iterdir())

    def left(needed: int, limit: int) -> set[str]:
        make_room(tmp_path, tmp_path / "own", needed, limit)
        return {path.name for path in tmp_path.iterdir()}

    assert left(each, 4 * each) == {"old", "own", "middle", "new"}
    assert left(each, 3 * each) == {"own", "middle", "new"}
    assert left(each, 2 * each) == {"own", "new"}
    assert left(5 * each, each) == {"own"}
    make_room(tmp_path / "nowhere", tmp_path / "nowhere" / "own", 1, 1)
