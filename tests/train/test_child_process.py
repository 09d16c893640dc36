"""Child processes end with their parent, with all that they started, and import tailora from anywhere."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tailora.errors import ConfigError, MemoryLimitError
from tailora.train.child_process import (
    ChildProcess,
    PipeError,
    command_of,
    connection_to_parent,
    messages_of_parent,
)
from tailora.train.failures import Failure

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def answer(what: str) -> None:
    """In the child: answers the first message with its pid and those of processes that it starts, and goes on."""
    messages, parent = messages_of_parent(), connection_to_parent()
    print("printed")
    message = messages.recv()
    if what == "fail":
        parent.send(Failure.of(ConfigError(message)))
    if what == "write":
        os.write(parent.fileno(), message.encode())
    assert not sys.stdin.read()  # the pipe of the messages is not its input
    started = [subprocess.Popen(SLEEP, start_new_session=own_session) for own_session in (False, True)]
    parent.send([message, os.getpid(), *(process.pid for process in started)])
    if what == "compute":
        9**9**9**9  # keeps Python's lock
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)


def command(what: str) -> list[str]:
    here, name = str(Path(__file__).parent), Path(__file__).stem
    run = [*command_of(answer), what]
    return [part.replace(f"from {answer.__module__} ", f"sys.path.append({here!r}); from {name} ") for part in run]


def have_ended(pids: list[int]) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("what", "how"), [("sleep", "end"), ("compute", "the parent closes its pipe")])
def test_a_child_ends_with_all_that_it_started(
    what: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    with ChildProcess(command(what), log=tmp_path / "log.txt") as child:
        child.send("hello")
        message, *pids = child.receive(60)
        assert message == "hello"
        with pytest.raises(TimeoutError):
            child.receive(0.1)
        if how == "end":
            child.end()
        else:
            child._output.close()  # as the system does for a parent that was killed
        assert have_ended(pids)
        with pytest.raises(EOFError):
            child.receive()
        assert isinstance(child.error("the work"), MemoryLimitError)
    assert (tmp_path / "log.txt").read_text() == "printed\n"


@pytest.mark.parametrize("wait", [True, False])
def test_what_a_crashed_child_started_ends_too(wait: bool, tmp_path: Path) -> None:
    with ChildProcess(command("crash"), log=tmp_path / "log.txt") as child:
        child.send("hello")
        _, *pids = child.receive(60)
        if wait:
            assert have_ended(pids)
            assert f"the work exited with code {-signal.SIGSEGV}" in str(child.error("the work"))
    assert have_ended(pids)


def test_several_threads_end_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    child = ChildProcess(["sleep", "600"])
    monkeypatch.setattr(type(child._output), "_close", lambda self: (time.sleep(0.2), os.close(self._handle)))
    with ThreadPoolExecutor(3) as pool:
        for ended in [pool.submit(child.end) for _ in range(3)]:
            ended.result()
    assert child.process.poll() == -signal.SIGKILL


def test_an_error_of_tailora_is_raised_in_the_parent(tmp_path: Path) -> None:
    with ChildProcess(command("fail"), log=tmp_path / "log.txt") as child:
        child.send("the reason")
        with pytest.raises(ConfigError, match="the reason"):
            child.receive(60)


@pytest.mark.parametrize("text", ["a line of text\n", "\x80\x05", "\0\0\0\5value"])
def test_what_a_child_writes_to_the_pipe_is_no_message(text: str, tmp_path: Path) -> None:
    with ChildProcess(command("write"), log=tmp_path / "log.txt") as child:
        child.send(text)
        with pytest.raises(PipeError, match="it wrote to the pipe"):
            child.receive(60)


def test_a_message_that_stops_in_the_middle_is_not_awaited_for_ever(tmp_path: Path) -> None:
    with ChildProcess(command("write"), log=tmp_path / "log.txt") as child:
        child.send("\0\0\x7f\0half of it")
        assert child._input.poll(60)
        with pytest.raises(TimeoutError):
            child.receive(0.5)


def test_a_message_over_the_limit_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailora.train.child_process.MOST_BYTES", 100)
    with ChildProcess(command("answer"), log=tmp_path / "log.txt") as child:
        child.send("x" * 1000)
        with pytest.raises(PipeError, match=r"its message has [\d,]+ bytes, and may have 100"):
            child.receive(60)
