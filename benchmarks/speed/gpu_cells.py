"""The cells of gpu.py. Each prints what it has measured as JSON, one object a line, as soon as it has it."""

import gc
import importlib
import itertools
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial, partialmethod
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.speed.shapes import SHAPES as CPU_SHAPES
from benchmarks.speed.shapes import Shape, write_model, write_rows
from tailora import LoRAConfig, LoRAModel
from tailora.core.device import choose_device, device_name, fast_dtype, synchronize

if TYPE_CHECKING:
    from tailora.data.dataset import Example

SHAPES = {
    "135M": CPU_SHAPES["S"],
    # The widths of Llama 3 8B; eight of its 32 layers, since the models of all arms are in memory together.
    "8B": Shape(4096, 14336, 8, 32, 8, 128256, tied=False, rows=1, length=2048),
    "tiny": Shape(64, 128, 2, 4, 2, 500, tied=True, rows=2, length=64),
}
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # cudaDeviceSynchronize is the profiler's
R = 16


def report(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


# ---- The device


def use_device(name: str) -> torch.device:
    """Returns the device, with "pretend" the accelerator of the tests, which this process then has."""
    if name == "pretend":
        device: torch.device = importlib.import_module("pretend_accelerator").install()
        layers: Any = importlib.import_module("tailora.kernels.compiled_layers").CompiledLayers
        layers.__init__ = partialmethod(layers.__init__, backend="aot_eager")  # inductor makes no code for it
        return device
    return choose_device(name)


def about(device: torch.device) -> dict[str, Any]:
    module = torch.get_device_module(device)
    memory = module.mem_get_info(device)[1] if hasattr(module, "mem_get_info") else None
    versions = {"cuda": torch.version.cuda, "hip": torch.version.hip, "dtype": str(fast_dtype(device))}
    return {"type": device.type, "name": device_name(device), "memory_bytes": memory, **versions}


def peaks(device: torch.device) -> dict[str, int]:
    """Returns the most bytes that tensors took, and that torch took for them, since the last reset."""
    module = torch.get_device_module(device)
    names = {"allocated": "max_memory_allocated", "reserved": "max_memory_reserved"}
    return {key: getattr(module, name)(device) for key, name in names.items() if hasattr(module, name)}


def reset(device: torch.device) -> None:
    """Gives memory that torch keeps back to the device, for the other processes, and starts the peaks again."""
    gc.collect()
    module = torch.get_device_module(device)
    for name, arguments in (("empty_cache", ()), ("reset_peak_memory_stats", (device,))):
        if hasattr(module, name):
            getattr(module, name)(*arguments)


@contextmanager
def counted(device: torch.device) -> Iterator[dict[str, int]]:
    """Counts kernels and waits of the host within the block. The dictionary stays empty where neither is known."""
    counts: dict[str, int] = {}
    if device.type == "cuda":
        from torch.profiler import DeviceType, ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            yield counts
        events = profiler.events() or []
        on_device = [event.name for event in events if event.device_type == DeviceType.CUDA]
        counts["kernels"] = sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)
        counts["waits"] = sum(event.name in WAITS for event in events)
    elif device.type == "pretend":
        with importlib.import_module("pretend_accelerator").counted() as found:
            yield counts
        waits = found.synchronisations.total() - found.synchronisations["device"]
        counts |= {"kernels": found.kernels.total(), "waits": waits}
    else:
        yield counts


def seconds_of(step: Callable[[], Any], device: torch.device, repeats: int = 5) -> list[float]:
    """Returns the seconds of each repeat, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times[1:]


# ---- Models


def model(device: torch.device, folder: Path, model: str) -> None:
    """Writes a Hugging Face folder of random weights, which are made on the device."""
    write_model(SHAPES[model], folder / model, device)
    report({"parameters": sum(path.stat().st_size for path in (folder / model).glob("*.safetensors")) // 2})


# ---- Training: every arm in its own process, and blocks of steps in turn


@dataclass
class Turns:
    """Is told of every step of an arm. After each block of steps it sends what they took, and waits for the next."""

    connection: Connection
    device: torch.device
    folder: Path
    left: int = 3  # steps of the block that loads and compiles
    measured: int = 0  # steps of the block that are timed; one more comes before them
    is_counted: bool = False
    _since: float = field(default_factory=time.perf_counter)
    _stack: ExitStack = field(default_factory=ExitStack)
    _counts: dict[str, int] = field(default_factory=dict)

    def start(self) -> None:
        """For trainers.py, whose stopwatch starts here."""

    def after_step(self, *_: Any) -> None:
        self.left -= 1
        if self.left == self.measured and self.measured:
            self._begin()
        elif self.left == 0:
            self._end()

    def _begin(self) -> None:
        reset(self.device)
        if self.is_counted:
            self._counts = self._stack.enter_context(counted(self.device))
        synchronize(self.device)
        self._since = time.perf_counter()

    def _end(self) -> None:
        synchronize(self.device)
        seconds = (time.perf_counter() - self._since) / max(self.measured, 1)
        self._stack.close()
        counts = {name: number / self.measured for name, number in self._counts.items()}
        self._counts = {}
        self.connection.send({"seconds": seconds, **peaks(self.device), **counts})
        reset(self.device)
        message = self.connection.recv()
        if message is None:
            from benchmarks.speed.arms import Stopped  # with all that a run needs: other cells do without

            raise Stopped
        self.measured, self.is_counted = message
        self.left = self.measured + 1


@dataclass(frozen=True)
class Task:
    """What all arms train on: documents of one length, as many as make the tokens of a step."""

    shape: Shape
    model: str  # folder
    data: str  # file
    examples: "list[Example]"


def train(
    device: torch.device, folder: Path, model: str, tokens: int, documents: list[int], steps: int, rounds: int
) -> None:
    """Reports seconds, peaks, kernels and waits of a step by length of the documents and arm."""
    tasks = [task_of(folder, model, tokens, length) for length in documents if length <= tokens]
    train_in_turn(device, folder, tasks, training_arms(), steps, rounds)


def task_of(folder: Path, model: str, tokens: int, length: int) -> Task:
    shape = replace(SHAPES[model], rows=tokens // length, length=length)
    data = folder / f"{model}-{tokens}-{length}.jsonl"
    return Task(shape, str(folder / model), str(data), write_rows(shape, data))


@dataclass(frozen=True)
class ArmProcess:
    """The process of an arm, seen from the cell's."""

    connection: Connection
    log: Path  # what it printed as an error

    @classmethod
    def start(cls, device: torch.device, folder: Path, function: str, settings: dict[str, Any]) -> "ArmProcess":
        context = multiprocessing.get_context("spawn")
        connection, child = context.Pipe()
        folder.mkdir()
        arguments = (child, device.type, str(device), folder, function, settings)
        context.Process(target=serve, args=arguments, daemon=True).start()
        child.close()  # so that its end is noticed
        return cls(connection, folder / "errors")

    def ask(self, message: Any) -> dict[str, Any]:
        """Sends a message and returns the answer; {"failed": reason} if the process has ended."""
        try:
            self.connection.send(message)
            answer: dict[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            return {"failed": (self.log.read_text().strip().splitlines() or ["its process ended without output"])[-1]}
        return answer


def train_in_turn(
    device: torch.device, folder: Path, tasks: list[Task], arms: dict[str, Any], steps: int, rounds: int
) -> None:
    place = Path(tempfile.mkdtemp(dir=folder))
    processes = {name: ArmProcess.start(device, place / str(i), *arm) for i, (name, arm) in enumerate(arms.items())}
    for task in tasks:
        for results in measure_in_turn(processes, task, steps, rounds):
            report({str(task.shape.length): results})


def measure_in_turn(
    processes: dict[str, ArmProcess], task: Task, steps: int, rounds: int
) -> Iterator[dict[str, dict[str, Any]]]:
    """Yields what is known of a step of each arm, after every round. Removes the processes that have ended."""
    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in processes}

    def ask(name: str, message: Any) -> dict[str, Any]:
        answer = processes[name].ask(message)
        if "failed" in answer:
            results[name]["failed"] = answer["failed"]
            del processes[name]
        return answer

    for name in [*processes]:
        results[name]["start_seconds"] = ask(name, task).get("seconds")
        yield results
    for _ in range(rounds):
        for name in [*processes]:
            if "failed" not in (answer := ask(name, (steps, False))):
                results[name]["seconds"].append(answer.pop("seconds"))
                results[name] |= answer
                results[name]["tokens_per_second"] = task.shape.tokens / median(results[name]["seconds"])
        yield results
    for name in [*processes]:
        if "failed" not in (answer := ask(name, (1, True))):
            results[name] |= {key: answer[key] for key in ("kernels", "waits") if key in answer}
            results[name]["chosen"] = ask(name, None).get("chosen")
    yield results


def training_arms() -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns name -> function of trainers.py, and its settings."""
    from importlib.util import find_spec

    arms: dict[str, tuple[str, dict[str, Any]]] = {
        "tailora": ("tailora", {}),
        "tailora, fast off": ("tailora", {"fast": "off"}),
        "tailora, compiled layers": ("tailora", {"fast": "compile"}),
        "PEFT + Trainer": ("trainer", {}),
    }
    if find_spec("trl"):
        arms["TRL, packed"] = ("trl", {"packing": True})
    if find_spec("liger_kernel"):
        arms["PEFT + Liger"] = ("trainer", {"use_liger_kernel": True})
    return arms


# ---- In an arm's process


def serve(
    connection: Connection, device_type: str, device_name: str, folder: Path, function: str, settings: dict[str, Any]
) -> None:
    """Trains on each task that comes, in blocks of steps."""
    with (folder / "errors").open("w") as errors:
        os.dup2(errors.fileno(), 2)
    warnings.simplefilter("ignore")
    device = use_device("pretend" if device_type == "pretend" else device_name)
    for module in ARM_MODULES[function]:  # all arms at the same time, before their first turn
        importlib.import_module(module)
    from benchmarks.speed.arms import Stopped

    for number in itertools.count():
        task: Task = connection.recv()
        turns = Turns(connection, device, folder / str(number))
        turns.folder.mkdir()
        chosen: list[str] = []
        with suppress(Stopped):
            ARM_FUNCTIONS[function](task, turns, chosen, settings)
        connection.send({"chosen": chosen})
        reset(device)


def run_config(task: Task, folder: Path, device: torch.device, settings: dict[str, Any]) -> Any:
    from benchmarks.speed.arms import train_config

    own = {"model": task.model, "data": task.data, "samples": 0, "r": R, "device": str(device)}
    return train_config(task.shape, folder, folder / "run", {**own, **settings})


def run_tailora(task: Task, turns: Turns, chosen: list[str], settings: dict[str, Any]) -> None:
    from tailora.train.events import Event, Note, Prepared, Stepped
    from tailora.train.trainer import run

    def on_event(event: Event) -> None:
        match event:
            case Note():
                chosen.append(event.text)
            case Prepared():
                chosen.append(event.header["kernels"])
            case Stepped():
                turns.after_step()

    run(run_config(task, turns.folder, turns.device, settings), on_event=on_event)


def run_trainer(task: Task, turns: Turns, _chosen: list[str], settings: dict[str, Any]) -> None:
    _run_in_trainers("trainer", task, turns, settings)


def run_trl(task: Task, turns: Turns, _chosen: list[str], settings: dict[str, Any]) -> None:
    _run_in_trainers(
        "trl", task, turns, {"max_length": task.shape.tokens, "per_device_train_batch_size": 1, **settings}
    )


def _run_in_trainers(function: str, task: Task, turns: Turns, settings: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    from benchmarks.speed import trainers

    on_device = {
        "use_cpu": turns.device.type == "cpu",
        "bf16": turns.device.type not in ("cpu", "pretend"),  # transformers knows the pretend accelerator by no name
        "num_train_epochs": 1_000_000,
    }
    getattr(trainers, function)(
        run_config(task, turns.folder, turns.device, {}),
        turns,
        base=load(Path(task.model), turns.device),
        tokenizer=AutoTokenizer.from_pretrained(task.model),
        examples=task.examples,
        **on_device,
        **settings,
    )


ARM_FUNCTIONS: dict[str, Callable[[Task, Turns, list[str], dict[str, Any]], None]] = {
    "tailora": run_tailora,
    "trainer": run_trainer,
    "trl": run_trl,
}
ARM_MODULES = {
    "tailora": ["tailora.train.trainer"],
    "trainer": ["benchmarks.speed.trainers", "peft", "transformers.trainer"],
    "trl": ["benchmarks.speed.trainers", "peft", "trl", "trl.trainer.sft_trainer"],
}


# ---- Quantised


def nf4(
    device: torch.device, folder: Path, model: str, tokens: int, documents: list[int], steps: int, rounds: int
) -> None:
    """Reports a step on an NF4 base, compared with a bf16 base."""
    arms = {"bf16": ("tailora", {}), "nf4": ("tailora", {"quantize": "nf4"})}
    tasks = [task_of(folder, model, tokens, length) for length in documents]
    train_in_turn(device, folder, tasks, arms, steps, rounds)


# ---- Decoding


def decode(device: torch.device, folder: Path, model: str, rows: int, new_tokens: int) -> None:
    """Reports seconds to the first token and of each later one, and a token's kernels, by arm."""
    from peft import LoraConfig, get_peft_model

    prompt = random_ids(model, (rows, 64), device)
    ours = LoRAModel(load(folder / model, device), LoRAConfig(r=R), "LoRA").eval()
    ours.add_adapter("DoRA", LoRAConfig(r=R, use_dora=True))
    randomize(ours)

    def answer(name: str | None, is_counted: bool) -> dict[str, Any]:
        ours.set_adapter(name)
        return decoding_times(ours, prompt, new_tokens, device, is_counted)

    def merged(is_counted: bool) -> dict[str, Any]:
        ours.set_adapter("LoRA")
        with ours.merged():
            return decoding_times(ours, prompt, new_tokens, device, is_counted)

    arms: dict[str, Callable[[bool], dict[str, Any]]] = {
        "base": partial(answer, None),
        "tailora": partial(answer, "LoRA"),
        "tailora, DoRA": partial(answer, "DoRA"),
        "tailora, merged": merged,
    }
    for name, is_dora in (("PEFT", False), ("PEFT, DoRA", True)):
        settings = LoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=is_dora)
        theirs = get_peft_model(load(folder / model, device), settings).eval()
        arms[name] = partial(decoding_times, theirs, prompt, new_tokens, device)
    times = [{name: arm(turn == 3) for name, arm in arms.items()} for turn in range(4)][1:]
    for name in arms:
        of_arm = [turn[name] for turn in times]
        report(
            {name: {"first": [t["first"] for t in of_arm], "next": [t["next"] for t in of_arm], **of_arm[-1]["counts"]}}
        )


def decoding_times(
    model: Any, prompt: Tensor, new_tokens: int, device: torch.device, is_counted: bool
) -> dict[str, Any]:
    def generate(count: int) -> None:
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)

    one, many = (seconds_of(partial(generate, count), device, repeats=1)[0] for count in (1, new_tokens))
    totals: list[dict[str, int]] = []
    for count in (2, 3) if is_counted else ():
        with counted(device) as counts:
            generate(count)
        totals.append(counts)
    of_a_token = {name: totals[1][name] - totals[0][name] for name in totals[0]} if is_counted else {}
    return {"first": one, "next": (many - one) / (new_tokens - 1), "counts": of_a_token}


def random_ids(model: str, size: tuple[int, int], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, SHAPES[model].vocabulary, size, generator=generator).to(device)


def load(folder: Path, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=fast_dtype(device)).to(device)


def randomize(model: LoRAModel) -> None:
    """Makes all factors of all adapters other than zero, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    for name in model.adapters:
        for layer in model.adapter(name).low_rank.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.02)


CELLS: dict[str, Callable[..., None]] = {
    "model": model,
    "train": train,
    "nf4": nf4,
    "decode": decode,
}
