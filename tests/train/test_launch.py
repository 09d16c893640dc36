"""Several processes of one run: started by tailora, torchrun and accelerate, interrupted, killed, and resumed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.serving.server_process import free_port
from tailora.cli.__main__ import run
from tailora.cli.main import main
from tailora.core import device
from tailora.errors import WORSE, ConfigError
from tailora.train import launch
from tailora.train.config import TrainConfig
from tailora.train.config_file import config_text
from tailora.train.launch import LAUNCHED_BY_TAILORA, count_processes
from tailora.train.setup import start_accelerator

LONGEST = 300  # s; some 10 on an idle machine
SECONDS_TO_END = 60  # after a process of the run was killed
LONG = {"max_steps": 5000, "save_steps": 5, "lr_scheduler_type": "constant", "warmup_ratio": 0, "samples": 0}


# ---- Real processes


class Start:
    """`tailora train` in two processes, in the background. Its output goes to a file."""

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        self.log = folder / "log"
        kept = {
            name: value for name, value in os.environ.items() if name not in ("ACCELERATE_USE_CPU", LAUNCHED_BY_TAILORA)
        }
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                cwd=folder,
                env={**kept, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background of a shell
            )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + LONGEST
        while not happened():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(self.log.read_text())
            time.sleep(0.05)

    def pid(self, rank: int) -> int:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child.pid for child in children if child.environ().get("RANK") == str(rank))

    def end(self, limit: float = LONGEST) -> tuple[int, str]:
        """Waits; returns the exit code, and all that was printed. No process may be left."""
        try:
            code = self.process.wait(limit)
        finally:
            remaining = self.kill()
        assert not remaining, self.log.read_text()
        return code, self.log.read_text()

    def kill(self) -> list[psutil.Process]:
        """Kills all processes of this run, and returns them."""
        processes = psutil.process_iter(["cmdline"])
        folder = str(self.log.parent)
        remaining = [process for process in processes if folder in " ".join(process.info["cmdline"] or [])]
        for process in remaining:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return remaining


def launcher(name: str, words: list[str]) -> list[str]:
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tailora", "--"]
    accelerate = [*python, "accelerate.commands.launch", "--multi-gpu", "--num-processes", "2"]
    ways = {
        "tailora": [sys.executable, "-P", "-m", "tailora", *words, "--nproc-per-node", "2"],
        "torchrun": [*torchrun, *words],
        "accelerate": [*accelerate, "--main_process_port", "0", "-m", "tailora", *words],
    }
    return ways[name]


def flags(config: TrainConfig) -> list[str]:
    values = config.model_dump(exclude_unset=True, mode="json").items()
    return ["train", *(word for name, value in values for word in (f"--{name.replace('_', '-')}", str(value)))]


def resumed(text: str, *more: str) -> list[str]:
    """Returns the command in the last line of a message, as this Python runs it."""
    words = shlex.split(text.splitlines()[-1])
    module = {"tailora": ["tailora"], "torchrun": ["torch.distributed.run", "--standalone"]}[words[0]]
    return [sys.executable, "-m", *module, *words[1:], *more]


def errors_in(text: str) -> list[str]:
    return re.findall(r"^(?:error: .*|interrupted(?:: .*)?|Traceback.*)$", text, re.M)


def one_error_in(text: str) -> str:
    """Returns the only message; a traceback may be torchrun's own."""
    (message,) = [line for line in errors_in(text) if not line.startswith("Traceback")]
    return message


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_of_two_processes_is_interrupted_resumed_and_killed(settings: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Start(launcher("tailora", flags(settings(**LONG))), tmp_path)
    run.wait_for(lambda: bool(checkpoints(out)))
    os.kill(run.pid(1), signal.SIGINT)  # to one of them; the test below has the launcher's
    code, text = run.end()
    assert code == 130, text
    saved = checkpoints(out)[-1]
    (message,) = errors_in(text)
    assert message == f"interrupted: the run so far is saved in {out}/checkpoint-{saved}; to resume it:"
    command = f"tailora train --nproc-per-node 2 --config {out}/config.yaml --resume-from-checkpoint "
    assert text.splitlines()[-1] == f"{command}{out}/checkpoint-{saved}"
    assert text.count("loading the model and data") == 1  # rank 0 alone
    record = json.loads((out / "run.json").read_text())
    assert (record["processes"], record["machine"]["threads"]) == (2, 1)
    assert "nproc" not in (out / "config.yaml").read_text()

    run = Start(resumed(text), tmp_path)
    run.wait_for(lambda: checkpoints(out)[-1] > saved)
    os.kill(run.pid(1), signal.SIGKILL)
    code, text = run.end(SECONDS_TO_END)
    assert code == 1
    (message,) = errors_in(text)
    cause = "error: process 1 was killed (SIGKILL), probably out of memory; the last checkpoint is "
    assert message == f"{cause}{out}/checkpoint-{checkpoints(out)[-1]}; to resume it:"


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["tailora", "torchrun", "accelerate"])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_launcher_stops_all_and_the_printed_command_goes_on(
    way: str, number: str, settings: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = Start(launcher(way, flags(settings(**LONG))), tmp_path)
    run.wait_for(lambda: bool(checkpoints(out)))
    run.process.send_signal(getattr(signal, number))
    code, text = run.end()
    assert code == (130 if way == "tailora" else 1)  # torchrun and accelerate have no other
    assert text.count("interrupted") == 1
    (command,) = re.findall(r"; to resume it.*:\n(.*)", text)
    steps = checkpoints(out)[-1] + 4
    code, text = Start(resumed(command, "--max-steps", str(steps)), tmp_path).end()
    assert code == 0, text
    record = json.loads((out / "run.json").read_text())
    assert (record["processes"], record["result"]["steps"]) == (2, steps)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("way", "flag", "value"),
    [
        pytest.param("tailora", "target_modules", "nosuch", marks=pytest.mark.slow),
        pytest.param("torchrun", "target_modules", "nosuch", marks=pytest.mark.exhaustive),
    ],
)
def test_a_mistake_that_all_processes_notice_is_shown_once(
    way: str, flag: str, value: str, settings: Any, tmp_path: Path
) -> None:
    if way == "tailora":
        (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    code, text = Start(launcher(way, flags(settings(**{flag: value}))), tmp_path).end()
    assert code == (2 if way == "tailora" else 1), text  # torchrun has no other
    assert value in one_error_in(text)


FAIL = """
import os, signal, sys, threading, time

def patch(case):
    while not hasattr(sys.modules.get("tailora.train.trainer"), "Trainer"):
        time.sleep(.01)
    trainer = sys.modules["tailora.train.trainer"]
    owner, name, last = {
        "folder": (trainer.run_log, "check_run_folder", 1),  # in the main process alone
        "step": (trainer, "clip_gradients", 3),
        "save": (trainer.checkpoint, "damage" if os.environ["RANK"] == "0" else "not_finite", 3),
        "evaluation": (trainer, "evaluate", 3),
        "answer": (sys.modules["tailora.cli.train"], "answer_prompts", 1),
    }[case]
    before, calls = getattr(owner, name), []

    def fails(*arguments, **named):
        calls.append(1)
        if len(calls) == last:
            if "RAISES" in os.environ:
                from tailora import errors
                raise getattr(errors, os.environ["RAISES"], ZeroDivisionError)("row 7 is broken")
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*arguments, **named)

    setattr(owner, name, fails)

case, _, rank = os.environ.get("FAILS", "").partition(" ")
if case and os.environ.get("RANK") == rank:
    threading.Thread(target=patch, args=[case], daemon=True).start()
"""


def failing(folder: Path, case: str, rank: int, raises: str | None = None) -> dict[str, str]:
    """Returns the environment in which this rank fails in this part of a run: it is killed, or raises an error."""
    (folder / "sitecustomize.py").write_text(FAIL)
    error = {} if raises is None else {"RAISES": raises}
    return {"PYTHONPATH": f"{folder}:{os.getcwd()}", "FAILS": f"{case} {rank}", **error}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("way", "more"), [("tailora", []), ("tailora", ["--fsdp"]), ("torchrun", [])])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ["step", "save", "evaluation"])
def test_a_killed_process_ends_all_with_one_message_and_the_run_resumes(
    case: str, rank: int, way: str, more: list[str], settings: Any, tmp_path: Path
) -> None:
    """torchrun's own table of failures comes in addition."""
    out = tmp_path / "out"
    words = [*flags(settings(**{**LONG, "save_steps": 1, "eval_steps": 2})), *more]
    run = Start(launcher(way, words), tmp_path, **failing(tmp_path, case, rank))
    run.wait_for(lambda: "reading model" in run.log.read_text())
    code, text = run.end(SECONDS_TO_END + 30)  # 30 s until it dies
    assert code == 1
    message = one_error_in(text)
    assert "because memory ran out" in message or f"process {rank} was killed (SIGKILL)" in message
    (command,) = {line.strip() for line in re.findall(r"; to resume it.*:\n(.*)", text)}  # torchrun repeats it
    steps = checkpoints(out)[-1] + 4
    code, text = Start(resumed(command, "--max-steps", str(steps)), tmp_path).end()
    assert code == 0, text
    assert json.loads((out / "run.json").read_text())["finished"]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".") and path.name != ".lock"]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param("folder", marks=pytest.mark.exhaustive), "step", "answer"])
def test_without_a_launcher_a_failure_ends_all_with_one_message_and_its_exit_code(
    case: str, settings: Any, tmp_path: Path
) -> None:
    words = flags(settings(max_steps=3, device="cpu"))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **shared, **failing(tmp_path, case, int(case != "folder"), "DataError")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tailora", *words, *(["--fsdp"] if case == "answer" else [])],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    text = "".join(process.communicate(timeout=LONGEST)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], text
    assert errors_in(text) == ["error: row 7 is broken"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "way",
    [
        pytest.param("tailora", marks=pytest.mark.slow),
        *(pytest.param(way, marks=pytest.mark.exhaustive) for way in ("torchrun", "accelerate")),
    ],
)
def test_a_run_whose_launcher_was_killed_saves_a_checkpoint_and_ends(way: str, settings: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Start(launcher(way, flags(settings(**LONG))), tmp_path)
    run.wait_for(lambda: bool(checkpoints(out)))
    before = checkpoints(out)[-1]
    ranks = [psutil.Process(run.pid(rank)) for rank in range(2)]
    run.process.kill()
    psutil.wait_procs(ranks, SECONDS_TO_END)
    _, text = run.end()
    saved = checkpoints(out)[-1]
    assert saved >= before
    if way == "tailora":  # the launcher would have printed it
        assert errors_in(text) == []
    else:
        (message,) = errors_in(text)
        assert message.startswith(f"interrupted: the run so far is saved in {out}/checkpoint-{saved}; to resume it")


@pytest.mark.ranks
@pytest.mark.exhaustive
def test_a_process_that_does_not_answer_ends_the_run_and_is_named(settings: Any, tmp_path: Path) -> None:
    run = Start(launcher("tailora", flags(settings(**LONG, ddp_timeout=5))), tmp_path)
    run.wait_for(lambda: bool(checkpoints(tmp_path / "out")))
    os.kill(run.pid(1), signal.SIGSTOP)
    code, text = run.end(SECONDS_TO_END)
    assert code == 1
    assert "process 1 of this run did not answer within --ddp-timeout" in one_error_in(text)


# ---- How a process was started


def test_processes_that_cannot_connect_in_time_are_an_error(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*, cpu: bool, timeout: timedelta) -> None:
        raise RuntimeError(f"Gloo connectFullMesh failed after {timeout}, cpu={cpu}\nat line 3")

    monkeypatch.setattr("tailora.train.setup.PartialState", connect)
    with pytest.raises(
        ConfigError, match=r"cannot connect \(Gloo .* after 0:01:07, cpu=True\); set GLOO_SOCKET_IFNAME"
    ):
        start_accelerator(settings(device="cpu", ddp_timeout=67))


@pytest.mark.parametrize(
    ("variables", "start"),
    [
        ({}, "to go on:\ntailora train"),
        ({"WORLD_SIZE": "2", LAUNCHED_BY_TAILORA: "2"}, "to go on:\ntailora train --nproc-per-node 2"),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "to go on, adding your launcher's other options:\ntorchrun --nproc-per-node 2 -m tailora -- train",
        ),
    ],
    ids=["alone", "tailora", "torchrun"],
)
def test_a_run_resumes_in_as_many_processes(
    variables: dict[str, str], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = launch.how_to_resume(Path("out/checkpoint-3"), "--r", "1", purpose="to go on")
    assert text == f"{start} --config out/config.yaml --resume-from-checkpoint out/checkpoint-3 --r 1"


# ---- How many processes


@pytest.mark.parametrize(
    ("asked", "name", "names", "variables", "expected"),
    [
        ("3", "auto", "cpu", {}, 3),
        ("auto", "auto", "cpu", {}, 1),
        ("gpu", "auto", "cpu", {}, "gpu is not supported on a CPU"),
        ("two", "auto", "cpu", {}, "use a number"),
        ("0", "auto", "cpu", {}, "use a number"),
        ("2", "auto", "cpu", {"WORLD_SIZE": "2"}, "has already started 2 processes"),
        ("gpu", "auto", "cuda:0 cuda:1 cpu", {}, 2),
        ("auto", "cuda", "cuda:0 cuda:1 cpu", {}, 2),
        ("2", "cpu", "cuda:0 cpu", {}, 2),
        ("2", "auto", "cuda:0 cpu", {}, "use at most 1 .cuda"),
        ("2", "auto", "cuda:0 cpu", {"ACCELERATE_USE_CPU": "true"}, 2),
        ("2", "auto", "cuda:0 cpu", {"ACCELERATE_TORCH_DEVICE": "cpu"}, 2),
        ("2", "cuda:1", "cuda:0 cuda:1 cpu", {}, "; use --device cuda"),
        ("1", "cuda:1", "cuda:0 cuda:1 cpu", {}, 1),
        ("gpu", "npu", "cuda:0 cpu", {}, "no device 'npu' on this machine; torch .* finds cuda:0, cpu"),
    ],
)
def test_the_number_of_processes(
    asked: str, name: str, names: str, variables: dict[str, str], expected: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"):  # of tests, or the pretend accelerator
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(device, "devices", lambda: [device.torch.device(name) for name in names.split()])
    with pytest.raises(ConfigError, match=expected) if isinstance(expected, str) else nullcontext():
        assert count_processes(asked, name) == expected


@pytest.fixture
def config_file(settings: Any, tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(config_text(settings().model_dump()))
    return str(path)


def test_mistakes_are_refused_once_before_any_process_is_started(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tailora.cli.train.launch", pytest.fail)
    for mistake, message in (
        ("--nproc-per-node 0", "use a number"),
        ("--nproc-per-node 2 --lora-alpha -1", "--lora-alpha '-1': "),
        ("--nproc-per-node 2 --resume-from-checkpoint latest --overwrite", "use only one of these flags"),
    ):
        assert main(["train", "--config", config_file, *mistake.split()]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("error: ") == 1


def test_a_process_of_ours_starts_and_counts_no_others(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object, **__: object) -> None:
        raise ConfigError("this process trains")

    monkeypatch.setenv(LAUNCHED_BY_TAILORA, "2")
    monkeypatch.setattr("tailora.cli.train.count_processes", pytest.fail)
    monkeypatch.setattr("tailora.cli.train.run_progress", refuse)
    assert main(["train", "--config", config_file, "--nproc-per-node", "2"]) == 2
    assert capsys.readouterr().err == "error: this process trains\n"


def test_the_processes_get_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[Any] = []
    monkeypatch.setattr("tailora.cli.train.fetch_sources", lambda *_: None)
    monkeypatch.setattr("tailora.cli.train.launch", lambda *arguments: started.append(arguments))
    given = ["demo", "--r", "4", "--device", "cpu", "--nproc-per-node", "2"]
    assert main(["--", *given]) == 0
    assert started == [(run, given, 2, Path("outputs/demo"), [WORSE])]
