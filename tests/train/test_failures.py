"""How a failure or a signal in one process of a run reaches the others, and which message is shown."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from tailora.cli.main import BUG, MAX_LINES, fail, log, main
from tailora.errors import ConfigError, DataError, MemoryLimitError, ProcessFailedError
from tailora.quiet import silent_loggers
from tailora.train.failures import (
    ERROR_FILE,
    SECONDS_FOR_ONE_SIGNAL,
    SHOWN_BY,
    SIGNALS,
    Interrupted,
    StopSignals,
    cause_of,
    fail_together,
    leave_failure,
    shown_by,
)
from tailora.train.launch import LAUNCHED_BY_TAILORA, MAX_SIGNALS, SignalForwarder, how_to_go_on

# ---- Which message is shown


BUG_IN_1 = {"traceback": "Traceback ..."}
BUG_OF_1 = ProcessFailedError("process 1 failed: ZeroDivisionError: by zero", traceback="Traceback ...")
CRASHED = ProcessFailedError("process 2 was terminated by SIGSEGV; ADVICE")
KILLED = MemoryLimitError("process 2 was killed (SIGKILL), probably out of memory; ADVICE")
LOST = ProcessFailedError("another process ended")
SAVED = KeyboardInterrupt("the run is saved")


@pytest.mark.parametrize(
    ("left", "exit_codes", "expected"),
    [
        ([(0, LOST, {}), (2, DataError("row 7"), {}), (1, DataError("8"), {})], {0: 1, 1: 2, 2: 2}, DataError("row 7")),
        ([(1, FileNotFoundError("no file"), {"exit_code": 2})], {1: 2}, ProcessFailedError("no file", 2)),
        ([(0, LOST, {}), (1, ZeroDivisionError("by zero"), BUG_IN_1)], {0: 1, 1: 1}, BUG_OF_1),
        ([(0, LOST, {}), (1, KeyboardInterrupt(), {})], {2: -9, 0: 1, 1: 130}, KILLED),
        ([], {2: -11, 0: 1}, CRASHED),
        ([(1, KeyboardInterrupt(), {}), (0, SAVED, {})], {1: 130, 0: 130}, SAVED),
        ([(0, KeyboardInterrupt(), {})], {1: 130, 0: 1}, KeyboardInterrupt("ADVICE")),
    ],
    ids=["first of its own", "of another type", "a bug", "killed", "crashed", "interrupted", "second signal"],
)
def test_one_error_is_shown_for_all_processes(
    left: Any, exit_codes: dict[int, int], expected: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, error, known in left:
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv(ERROR_FILE, str(tmp_path / str(rank) / "error.json"))
        assert leave_failure(error, **known)
    cause = cause_of(exit_codes, tmp_path, "ADVICE", interrupted=False)
    assert (type(cause), str(cause)) == (type(expected), str(expected))
    for attribute in ("exit_code", "traceback"):
        assert getattr(cause, attribute, None) == getattr(expected, attribute, None)
    if not left:
        assert isinstance(cause_of(exit_codes, tmp_path, "", interrupted=True), KeyboardInterrupt)


def test_the_traceback_of_a_bug_goes_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_to_divide(*_: object, **__: object) -> float:
        return 1 / 0

    monkeypatch.setattr("tailora.cli.main.app", lambda _: fail_to_divide)
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    monkeypatch.setenv(LAUNCHED_BY_TAILORA, "2")
    assert main([]) == 1
    assert capsys.readouterr().err == ""
    cause = cause_of({0: 1}, tmp_path, "", interrupted=False)
    assert isinstance(cause, ProcessFailedError)
    assert "in fail_to_divide" in cause.traceback
    monkeypatch.delenv(LAUNCHED_BY_TAILORA)
    with pytest.raises(ZeroDivisionError):  # torchrun prints no more than its own table
        main([])
    assert capsys.readouterr().err == f"{BUG}\n"


def test_the_launcher_prints_all_of_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(f"line {number}\n" for number in range(3 * MAX_LINES))
    assert fail(ProcessFailedError("process 0 failed: row 7", traceback=lines), False) == 1
    assert capsys.readouterr().err == f"{BUG}\n{lines}error: process 0 failed: row 7\n"


def test_a_process_without_a_message_shows_the_end_of_what_it_printed(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stderr.log").write_text("".join(f"line {number}\n" for number in range(50)))
    cause = str(cause_of({1: 1}, tmp_path, "", interrupted=False))
    assert cause.startswith("process 1 exited with code 1:\nline 30\n")
    assert cause.endswith("line 49")


def test_without_a_launcher_or_on_a_full_disk_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.delenv(ERROR_FILE, raising=False)
    assert not leave_failure(DataError("row 7"))
    for file in (tmp_path / "absent" / "error.json", tmp_path / "error.json"):
        monkeypatch.setenv(ERROR_FILE, str(file))
        monkeypatch.setattr(os, "fsync", disk_is_full)
        assert not leave_failure(DataError("row 7"))
    assert not list(tmp_path.iterdir())


def test_a_failed_run_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    assert how_to_go_on(tmp_path) == "no checkpoint was saved yet; use --save-steps N to save one every N steps"
    (tmp_path / "checkpoint-4").mkdir()
    assert how_to_go_on(tmp_path).endswith(f"--resume-from-checkpoint {tmp_path}/checkpoint-4")


def test_rank_0_alone_speaks_unless_the_processes_agreed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv(ERROR_FILE, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    log("a note")
    assert fail(KeyboardInterrupt(), False) == 130
    assert capsys.readouterr().err == ""
    assert fail(ConfigError("no launcher shows it"), False) == 2
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    assert fail(ConfigError("torchrun shows it"), False) == 2
    first = DataError("row 7")
    vars(first)[SHOWN_BY] = 1
    assert fail(first, False) == 2
    assert capsys.readouterr().err == "error: no launcher shows it\nerror: row 7\n"
    monkeypatch.setenv("RANK", "0")
    log("a note")
    assert fail(KeyboardInterrupt(), False) == 130
    assert capsys.readouterr().err == "a note\ninterrupted\n"


@pytest.mark.parametrize(("number", "code", "message"), [(0, 130, "interrupted\n"), (1, 2, "")], ids=["own", "another"])
def test_a_signal_explains_an_error_unless_another_rank_shows_it(
    number: int, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_in_a_library(*_: object, **__: object) -> None:
        error = ConfigError("what a library made of KeyboardInterrupt")
        vars(error)[SHOWN_BY] = number
        raise error

    monkeypatch.setattr("tailora.cli.main.app", lambda _: fail_in_a_library)
    monkeypatch.delenv(ERROR_FILE, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([], interrupted=lambda: True) == code
    assert capsys.readouterr().err == message


def test_torch_and_tailora_read_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(file))
    leave_failure(DataError("row 7"))
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))
    assert abs(failure.timestamp - time.time()) < 60
    assert "row 7" in str(ChildFailedError("tailora", {1: failure}))


# ---- Signals


def processes(count: int) -> Any:
    """Returns what `fail_together` reads of accelerate, in the first of so many processes."""
    return SimpleNamespace(num_processes=count, process_index=0)


def hang(_: object) -> Any:
    threading.Event().wait()


@pytest.mark.usefixtures("received")  # fail_together ignores signals from then on
@pytest.mark.parametrize(
    ("waiting", "check", "named"),
    [
        ((0, 1), None, "process 2 of this run"),
        ((0,), None, "process 1, 2 of this run"),
        ((0, 1, 2), None, "another process of this run"),
        ((0, 1), hang, "process 0 of this run"),  # a cut link to the machine with the store
    ],
)
def test_a_process_that_does_not_answer_is_named(
    waiting: tuple[int, ...], check: Any, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HashStore()
    reached = SimpleNamespace(
        **{name: getattr(store, name) for name in ("add", "set", "get", "compare_set")}, check=check or store.check
    )
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: reached)
    monkeypatch.setattr("tailora.train.failures.SECONDS_TO_ANSWER", 0.1)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for rank in waiting:
        store.set(f"tailora.failure.1.waits.{rank}", "yes")
    with (
        pytest.raises(ProcessFailedError, match=f"{named} did not answer within --ddp-timeout; .*20000ms.*; go on"),
        fail_together(processes(3), lambda: "go on"),
    ):
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation")


@pytest.fixture
def received() -> Iterator[list[int]]:
    """The numbers of the signals that reach the handlers of this process."""
    numbers: list[int] = []
    before = {number: signal.signal(number, lambda number, _: numbers.append(number)) for number in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_one_of_several_processes_takes_a_signal_that_comes_twice_for_one(
    received: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with StopSignals(2) as signals:
        signals.handle()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.stop.is_set()
        assert received == []
        first = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: first + SECONDS_FOR_ONE_SIGNAL + 1)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]


@pytest.mark.parametrize("error", [DataError("row 7"), Interrupted(Path("checkpoint-1"))])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "loading"])
def test_a_launchers_signal_does_not_keep_a_process_from_saying_why_it_ended(
    error: BaseException, is_training: bool, received: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", HashStore)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with suppress(DataError, Interrupted), StopSignals(2) as signals, fail_together(processes(2)):
        if is_training:
            signals.handle()
        raise error
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert received == []
    assert shown_by(error) == (0 if isinstance(error, DataError) else None)


def test_a_process_alone_is_interrupted_also_after_an_error(received: list[int]) -> None:
    with suppress(DataError), StopSignals(1) as signals, fail_together(processes(1)):
        signals.handle()
        raise DataError("row 7")
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_a_second_hangup_changes_nothing(received: list[int]) -> None:
    with StopSignals() as signals:
        signals.handle()
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert signals.stop.is_set()
    assert received == []
    signal.raise_signal(signal.SIGHUP)
    assert received == [signal.SIGHUP]


@pytest.mark.usefixtures("received")
def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        signals.handle()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


ON_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also if the tests run under nohup
os.open(os.ttyname(0), os.O_RDWR)  # makes it the terminal of this session
from tailora.train.failures import StopSignals
with StopSignals() as signals:
    signals.handle()
    os.write(1, b"ready\\n")  # at once, since the test closes the terminal then
    while not signals.stop.wait(.01):
        pass
print("resume with ...", flush=True)  # an error where the terminal is gone
sys.exit(130)
"""


def test_a_run_ends_in_order_when_its_terminal_is_closed() -> None:
    terminal, end = os.openpty()
    command = [sys.executable, "-c", ON_TERMINAL]
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=subprocess.PIPE, start_new_session=True) as process:
        os.close(end)
        assert os.read(terminal, 100).startswith(b"ready")
        os.close(terminal)
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait()) == (b"", 130)


def test_many_hangups_do_not_kill_the_processes() -> None:
    signals = SignalForwarder()
    for _ in range(MAX_SIGNALS + 1):
        signals._receive(signal.SIGHUP, None)
    assert signals.pending == [signal.SIGHUP] * (MAX_SIGNALS + 1)


DEAF = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print("one", flush=True))
print("ready", flush=True)
while True:
    time.sleep(60)
"""


def test_the_third_signal_kills_the_processes() -> None:
    child = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True, start_new_session=True)
    with child, ThreadPoolExecutor(2) as executor, SignalForwarder() as signals:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        ended = executor.submit(child.wait)
        lines = executor.submit(send_signals, child)
        signals.forward_until_done(ended)
        assert signals.counts
        assert lines.result() == ["one\n", "one\n", ""]
    assert child.returncode == -signal.SIGKILL


def send_signals(child: "subprocess.Popen[str]") -> list[str]:
    """Sends SIGTERM to this process three times, each when the child has answered; returns what it has printed."""
    assert child.stdout is not None
    lines = []
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        lines.append(child.stdout.readline())
    child.kill()  # also if the third has not
    return lines


def test_silent_loggers_say_nothing_not_even_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("loud", "loud.silent"):  # as torch has a handler, and transformers' batching one of its own
        monkeypatch.setattr(logging.getLogger(name), "handlers", [logging.StreamHandler(sys.stderr)])
    with silent_loggers("loud.silent"):
        logging.getLogger("loud.silent.below").error("of another package")
    assert capsys.readouterr().err == ""
    logging.getLogger("loud.silent.below").error("of another package")
    assert capsys.readouterr().err == "of another package\n" * 2
