"""Serving 32 requests over 8 adapters: the continuous engine, one request after another, and PEFT's mixed batches.

    python -m benchmarks.serving.serve --threads 1            writes benchmarks/results/serve.json
    python -m benchmarks.serving.serve --threads 1 --quick    one round, written to the temporary folder

Prompts and answers have 16 to 64 tokens each (prompts are random), and all requests arrive at once. Only requested
tokens count as useful: a padded batch computes its longest answer for every row. PEFT runs all 32 as one batch
(`adapter_names`). A second part serves 32 requests for one adapter, and for the base, with 1 and with 64 adapters
loaded. A third part loads an adapter of 30 MB, while the engine is idle and while it is busy. All arms take turns; the
first round is not counted. "One by one" runs in only two rounds, because it is the slowest. The script takes about a
quarter of an hour with one thread.
"""

import argparse
import gc
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.speed.adapters import both_with_adapters, randomize_factors
from benchmarks.speed.arms import load_base_model, synthetic_task
from benchmarks.speed.shapes import SHAPES
from tailora import LoRAConfig, LoRAModel
from tailora.core.adapter_set import AdapterSet
from tailora.engine.continuous_batching import ContinuousEngine
from tailora.engine.interface import Finish, Request, SamplingParams, Token
from tailora.serve.registry import AdapterRegistry
from tailora.train.memory import keep_freed_memory

SHAPE, DTYPE = SHAPES["S"], "bfloat16"
REQUESTS, ADAPTERS, LOADED = 32, 8, 64
LOADED_RANK, LOADS = 24, 10  # of an adapter of 30 MB; loads in a round
ONE_BY_ONE = 2  # rounds of what takes longest
Workload = list[tuple[tuple[int, ...], str | None, int]]  # prompt, adapter, tokens of the answer
Result = dict[str, float]


def workload(names: list[str | None], seed: int = 0) -> Workload:
    chance = random.Random(seed)
    requests = []
    for number in range(REQUESTS):
        prompt = tuple(chance.randrange(1, SHAPE.vocabulary) for _ in range(chance.randint(16, 64)))
        requests.append((prompt, names[number % len(names)], chance.randint(16, 64)))
    return requests


def run_engine(engine: ContinuousEngine, requests: Workload) -> Result:
    """All requests at once."""
    began, first, ended = time.perf_counter(), dict[int, float](), [Event() for _ in requests]

    def handler(number: int) -> Any:
        def handle(event: Token | Finish) -> None:
            first.setdefault(number, time.perf_counter() - began)
            if isinstance(event, Finish):
                ended[number].set()

        return handle

    for number, (prompt, name, tokens) in enumerate(requests):
        params = SamplingParams(tokens, temperature=0.0, ignore_eos=True)
        engine.submit(Request(f"{began}-{number}", prompt, name, params), handler(number))
    for event in ended:
        event.wait()
    return figures(requests, time.perf_counter() - began, [*first.values()])


def run_one_by_one(model: LoRAModel, requests: Workload) -> Result:
    began, first = time.perf_counter(), []
    with torch.inference_mode():
        for prompt, name, tokens in requests:
            model.set_adapter(name)
            model.generate(
                input_ids=torch.tensor([prompt]), stopping_criteria=[NotesFirst(first, began)], **of_length(tokens)
            )
    return figures(requests, time.perf_counter() - began, first)


def run_peft(model: Any, requests: Workload) -> Result:
    """One batch, padded on the left, as long as its longest answer."""
    began, first = time.perf_counter(), []
    longest = max(len(prompt) for prompt, _, _ in requests)
    ids = torch.tensor([[0] * (longest - len(prompt)) + [*prompt] for prompt, _, _ in requests])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _, _ in requests])
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            adapter_names=[name for _, name, _ in requests],
            stopping_criteria=[NotesFirst(first, began)],
            **of_length(max(tokens for _, _, tokens in requests)),
        )
    return figures(requests, time.perf_counter() - began, first * len(requests))


def of_length(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}


class NotesFirst:
    """A stopping criterion that notes when the first token comes, and stops nothing."""

    def __init__(self, first: list[float], began: float) -> None:
        self.first, self.began, self.is_noted = first, began, False

    def __call__(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        if not self.is_noted:
            self.first.append(time.perf_counter() - self.began)
            self.is_noted = True
        return torch.zeros(len(ids), dtype=torch.bool)


def figures(requests: Workload, seconds: float, first: list[float]) -> Result:
    useful = sum(tokens for _, _, tokens in requests)
    in_order = sorted(first)
    return {
        "tokens_per_second": useful / seconds,
        "first_token_p50": statistics.median(in_order),
        "first_token_p95": in_order[int(0.95 * (len(in_order) - 1))],
    }


# ---- The three parts


def measure_arms(folder: Path, rounds: int) -> dict[str, list[Result]]:
    ours, peft = (model.eval() for model in both_with_adapters(folder, DTYPE, ADAPTERS))
    randomize_factors(ours)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    requests = workload(list(ours.adapters))
    results: dict[str, list[Result]] = {"one by one": [], "PEFT": [], "tailora": []}
    for number in range(rounds + 1):
        if number <= ONE_BY_ONE:
            results["one by one"].append(run_one_by_one(ours, requests))
        results["PEFT"].append(run_peft(peft, requests))
        engine = engine_of(ours._adapter_set)
        results["tailora"].append(run_engine(engine, requests))
        engine.stop()
        say(number, results)
    return {name: runs[1:] for name, runs in results.items()}


def measure_loaded(folder: Path, rounds: int) -> dict[str, list[Result]]:
    """The same requests of one adapter and of the base, with 1 and with 64 adapters in memory."""
    results: dict[str, list[Result]] = {}
    models = {count: with_adapters(folder, count) for count in (1, LOADED)}
    for number in range(rounds + 1):
        for count, model in models.items():
            engine = engine_of(model._adapter_set)
            for what, names in (("adapter", ["0"]), ("base", [None])):
                run = run_engine(engine, workload([*names]))
                results.setdefault(f"{what}, {count} loaded", []).append(run)
            engine.stop()
        say(number, results)
    return {name: runs[1:] for name, runs in results.items()}


def measure_loading(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the files of an adapter to a name that requests can use; within a run 8 requests are answered."""
    load_before = os.getloadavg()[0]
    model = LoRAModel(load_base_model(folder, DTYPE), LoRAConfig(r=LOADED_RANK))
    randomize_factors(model)
    seconds: dict[str, list[float]] = {"idle": [], "during 8 requests": []}
    with tempfile.TemporaryDirectory() as root:
        path = model.save_adapter(Path(root) / "adapter")
        size = (path / "adapter_model.safetensors").stat().st_size
        engine = engine_of(AdapterSet(model.unload().eval(), {}))
        registry = AdapterRegistry(engine.adapter_set, engine.paused, "base", Path(root))
        gc.collect()
        gc.freeze()  # as `tailora serve` does
        for _ in range(rounds + 1):
            seconds["idle"] += [load(registry) for _ in range(LOADS)]
            running = [f"running-{number}" for number in range(8)]
            for name in running:
                params = SamplingParams(2000, temperature=0.0, ignore_eos=True)
                engine.submit(Request(name, tuple(range(1, 33)), None, params), lambda _: None)
            time.sleep(1)
            seconds["during 8 requests"] += [load(registry) for _ in range(LOADS)]
            for name in running:
                engine.cancel(name)
        gc.unfreeze()
        engine.stop()
    return {
        "bytes": size,
        "load_before": load_before,
        "seconds": {name: measure.spread(values[LOADS:]) for name, values in seconds.items()},
    }


def load(registry: AdapterRegistry) -> float:
    began = time.perf_counter()
    registry.load("adapter", "adapter")
    seconds = time.perf_counter() - began
    registry.unload("adapter")
    return seconds


def with_adapters(folder: Path, count: int) -> LoRAModel:
    model = LoRAModel(load_base_model(folder, DTYPE), LoRAConfig(), "0")
    for name in map(str, range(1, count)):
        model.add_adapter(name, LoRAConfig())
    randomize_factors(model)
    return model.eval()


def engine_of(adapter_set: AdapterSet) -> ContinuousEngine:
    engine = ContinuousEngine(adapter_set, [], max_positions=2048)
    engine.start()
    return engine


def say(number: int, results: dict[str, list[Result]]) -> None:
    rates = ", ".join(f"{name} {runs[-1]['tokens_per_second']:.0f}" for name, runs in results.items())
    measure.log(f"round {number}, tokens/s: {rates}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=f"one round, written to {measure.QUICK}")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    load_before, began = os.getloadavg()[0], time.perf_counter()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory(torch.device("cpu"))  # as `tailora serve` does; all arms gain
    path = measure.QUICK / "serve.json" if arguments.quick else measure.RESULTS / "serve.json"
    with synthetic_task(SHAPE) as (_, folder, _rows):
        arms = {**measure_arms(folder, rounds), **measure_loaded(folder, rounds)}
        loading = measure_loading(folder, rounds)
    speed = {name: [run["tokens_per_second"] for run in runs] for name, runs in arms.items()}
    results = {
        "threads": arguments.threads,
        "rounds": rounds,
        "dtype": DTYPE,
        "load_before": load_before,
        "seconds": time.perf_counter() - began,
        "arms": {name: measure.summary(runs) for name, runs in arms.items()},
        "ratios": {
            "tailora over PEFT": ratio(speed["tailora"], speed["PEFT"]),
            "tailora over one by one": ratio(speed["tailora"], speed["one by one"]),
            "64 adapters loaded over 1": ratio(speed["adapter, 64 loaded"], speed["adapter, 1 loaded"]),
            "base: 64 adapters loaded over 1": ratio(speed["base, 64 loaded"], speed["base, 1 loaded"]),
        },
        "loading": loading,
    }
    measure.log(str(measure.write(path, results)))


def ratio(first: list[float], second: list[float]) -> dict[str, float]:
    """Of the runs of each round, which ran one after another, as far as both arms ran."""
    return measure.spread([a / b for a, b in zip(first, second, strict=False)])


if __name__ == "__main__":
    main()
