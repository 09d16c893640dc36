"""Child processes end with their parent, with all that they started, and import tailora from anywhere."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tailora.errors import ConfigError, MemoryLimitError
from tailora.train.child_process import ChildProcess, command_of, connection_to_parent, messages_of_parent
from tailora.train.failures import Failure


def answer(start: str) -> None:
    """In the child: answers the first message with its pid and those of a process that it starts, and waits."""
    messages, parent = messages_of_parent(), connection_to_parent()
    print("printed")
    message = messages.get()
    if start == "fail":
        parent.send(Failure.of(ConfigError(message)))
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    parent.send([message, psutil.Process().pid, sleeping.pid])
    time.sleep(600)


def command() -> list[str]:
    here, name = str(Path(__file__).parent), Path(__file__).stem
    run = [*command_of(answer)]
    return [part.replace(f"from {answer.__module__} ", f"sys.path.append({here!r}); from {name} ") for part in run]


def have_ended(pids: list[int]) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", ["end", "the parent closes its pipe"])
def test_a_child_ends_with_all_that_it_started(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    with ChildProcess([*command(), "run"], log=tmp_path / "log.txt") as child:
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


def test_an_error_of_tailora_is_raised_in_the_parent(tmp_path: Path) -> None:
    with ChildProcess([*command(), "fail"], log=tmp_path / "log.txt") as child:
        child.send("the reason")
        with pytest.raises(ConfigError, match="the reason"):
            child.receive(60)
