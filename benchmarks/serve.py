"""Serving 32 requests over 8 adapters: the continuous engine, one request after another, and PEFT's mixed batches.

    python benchmarks/serve.py            writes benchmarks/results/serve.json

Prompts have 16 to 64 random tokens and answers 16 to 64; all requests come at once. Useful tokens are those that were
asked for: a padded batch computes its longest answer for every row. PEFT runs all 32 as one batch (`adapter_names`).
A second part serves 32 requests of one adapter, with 1 and with 64 adapters loaded.
"""

import argparse
import random
import statistics
import time
from threading import Event
from typing import Any

import measure
import torch
from adapters import both_with_adapters
from arms import synthetic_task
from shapes import SHAPES

from tailora import LoRAModel
from tailora.serve.continuous import ContinuousEngine
from tailora.serve.engine import Finish, Request, SamplingParams, Token

SHAPE, DTYPE = SHAPES["S"], "bfloat16"
REQUESTS, ADAPTERS, LOADED = 32, 8, 64
Workload = list[tuple[tuple[int, ...], str, int]]  # prompt, adapter, tokens of the answer
Result = dict[str, float]


def workload(names: list[str], seed: int = 0) -> Workload:
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
                input_ids=torch.tensor([prompt]),
                streamer=FirstToken(first, began),
                **settings(tokens),
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
            **settings(max(tokens for _, _, tokens in requests)),
        )
    return figures(requests, time.perf_counter() - began, first * len(requests))


def settings(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}


class FirstToken:
    """A streamer that notes when the first token comes."""

    def __init__(self, first: list[float], began: float) -> None:
        self.first, self.began, self.calls = first, began, 0

    def put(self, _: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # after the prompt
            self.first.append(time.perf_counter() - self.began)

    def end(self) -> None:
        pass


class NotesFirst:
    """A stopping criterion that notes when the first token comes, and stops nothing."""

    def __init__(self, first: list[float], began: float) -> None:
        self.first, self.began = first, began

    def __call__(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        if not self.first:
            self.first.append(time.perf_counter() - self.began)
        return torch.zeros(len(ids), dtype=torch.bool)


def figures(requests: Workload, seconds: float, first: list[float]) -> Result:
    useful = sum(tokens for _, _, tokens in requests)
    in_order = sorted(first)
    return {
        "tokens_per_second": useful / seconds,
        "first_token_p50": statistics.median(in_order),
        "first_token_p95": in_order[int(0.95 * (len(in_order) - 1))],
    }


def measure_arms(rounds: int) -> dict[str, list[Result]]:
    with synthetic_task(SHAPE) as (_, folder, _rows):
        ours, peft = (model.eval() for model in both_with_adapters(folder, DTYPE, ADAPTERS))
        requests = workload(list(ours.adapters))
        results: dict[str, list[Result]] = {"one by one": [], "PEFT": [], "tailora": []}
        for _ in range(rounds + 1):
            results["one by one"].append(run_one_by_one(ours, requests))
            results["PEFT"].append(run_peft(peft, requests))
            engine = engine_of(ours)
            results["tailora"].append(run_engine(engine, requests))
            engine.stop(10)
    return {name: runs[1:] for name, runs in results.items()}  # the first round warms up


def measure_loaded(rounds: int) -> dict[str, list[Result]]:
    """The same requests of one adapter, with 1 and with 64 adapters in memory, and of the base."""
    results: dict[str, list[Result]] = {}
    with synthetic_task(SHAPE) as (_, folder, _rows):
        models = {count: both_with_adapters(folder, DTYPE, count)[0].eval() for count in (1, LOADED)}
        for _ in range(rounds + 1):
            for count, model in models.items():
                engine = engine_of(model)
                for what, names in (("adapter", [next(iter(model.adapters))]), ("base", [None])):
                    run = run_engine(engine, workload(names))  # type: ignore[arg-type]
                    results.setdefault(f"{what}, {count} loaded", []).append(run)
                engine.stop(10)
    return {name: runs[1:] for name, runs in results.items()}


def engine_of(model: LoRAModel) -> ContinuousEngine:
    engine = ContinuousEngine(model._adapter_set, [], max_positions=2048)
    engine.start()
    return engine


def medians(runs: list[Result]) -> dict[str, Any]:
    return {key: measure.spread([run[key] for run in runs]) for key in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arms, loaded = measure_arms(arguments.rounds), measure_loaded(arguments.rounds)
    speed = {name: [run["tokens_per_second"] for run in runs] for name, runs in {**arms, **loaded}.items()}
    results = {
        "threads": arguments.threads,
        "dtype": DTYPE,
        "arms": {name: medians(runs) for name, runs in {**arms, **loaded}.items()},
        "ratios": {
            "tailora over PEFT": ratio(speed["tailora"], speed["PEFT"]),
            "tailora over one by one": ratio(speed["tailora"], speed["one by one"]),
            "64 adapters loaded over 1": ratio(speed["adapter, 64 loaded"], speed["adapter, 1 loaded"]),
            "base: 64 adapters loaded over 1": ratio(speed["base, 64 loaded"], speed["base, 1 loaded"]),
        },
    }
    measure.log(str(measure.write("serve", results)))


def ratio(first: list[float], second: list[float]) -> dict[str, float]:
    """Of the runs of each round, which ran one after another."""
    return measure.spread([a / b for a, b in zip(first, second, strict=True)])


if __name__ == "__main__":
    main()
