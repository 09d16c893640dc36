"""Mixed load on a real `tailora serve`: checks that every request has the expected outcome and that memory stays flat.

    python -m benchmarks.serving.soak                         half an hour; writes benchmarks/results/soak.json
    python -m benchmarks.serving.soak --minutes 2 --quick     written next to the results of other --quick runs

The model is tiny, so there are many requests. Clients request the base, adapters and scales, complete and
streamed; they send invalid requests, and disconnect in the middle of an answer. One client loads, replaces and unloads
adapters. Not all adapters fit into the adapter memory. The greedy answer of a model to one prompt must never change.
The exit code is 1 if an outcome was not the expected one, or if the server did not shut down by itself.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from scipy import stats
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import measure
from benchmarks.speed.shapes import Shape, write_model
from tailora import LoRAConfig, LoRAModel

SHAPE = Shape(64, 128, 2, 4, 2, 512, tied=True, rows=1, length=1)
CLIENTS = 10
ADAPTERS = {  # what they are made with
    "small": {"r": 2},
    "middle": {"r": 8},
    "large": {"r": 32},
    "dora": {"r": 4, "use_dora": True},
    "embedding": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"r": 4, "modules_to_save": ["norm"]},
}
ADAPTER_MEMORY = 0.0006  # GB: not all of them at once
MODELS = ["base", *ADAPTERS, "small@0.5", "large@0.25"]
SAMPLE_SECONDS, WARM_UP = 2.0, 0.25  # between two looks at the memory; share of the time that is not counted
BUSY = 503  # all of the memory for adapters is in use: the client may try again
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@dataclass
class Record:
    """What happened. Several threads write to it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)  # model -> its greedy answer
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, outcome: str, reason: str = "") -> None:
        with self.lock:
            self.outcomes[f"{what}: {outcome}"] += 1
            if reason:
                self.unexpected.append(f"{what}: {reason}"[:500])

    def check(self, what: str, response: httpx.Response, *statuses: int) -> bool:
        """Notes an outcome; returns whether the request was answered."""
        is_right = response.status_code in statuses
        reason = "" if is_right else f"{response.status_code}, not {statuses}: {response.text}"
        self.add(what, str(response.status_code), reason)
        return is_right and response.status_code == 200

    def check_answer(self, model: str, answer: str) -> None:
        with self.lock:
            first = self.answers.setdefault(model, answer)
        if answer != first:
            self.add("greedy answer", "changed", f"{model} said {first!r} before, now {answer!r}")


# ---- The model and its adapters


def write_files(folder: Path) -> None:
    """The base, and a folder `adapters` with ADAPTERS, two broken ones, and two to load and replace."""
    write_model(SHAPE, folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model.save_pretrained(folder / "base")  # so that no answer depends on other requests
    settings: dict[str, dict[str, Any]] = {**ADAPTERS, "not-finite": {"r": 2}, "first": {"r": 4}, "second": {"r": 6}}
    for name, own in settings.items():
        adapted = LoRAModel(model, LoRAConfig(**own))
        for parameter in adapted.lora_layers.parameters():
            nn.init.normal_(parameter, std=0.2)
        path = adapted.save_adapter(folder / "adapters" / name)
        model = adapted.unload()
        if name == "not-finite":
            weights = path / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-8] + b"\xff" * 8)
    (folder / "adapters" / "not-finite").rename(folder / "adapters" / "broken")
    for name in ("first", "second", "broken"):  # served when a client loads them
        (folder / "adapters" / "loaded").mkdir(exist_ok=True)
        (folder / "adapters" / name).rename(folder / "adapters" / "loaded" / name)


# ---- Clients

Action = Callable[[httpx.Client, random.Random, Record], None]


def greedy(client: httpx.Client, chance: random.Random, record: Record) -> None:
    model = chance.choice(MODELS)
    body = {"model": model, "prompt": "w5 w6 w7", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    response = client.post("/v1/completions", json=body)
    if record.check("completion", response, 200, BUSY):
        record.check_answer(model, response.json()["choices"][0]["text"])


def sampled(client: httpx.Client, chance: random.Random, record: Record) -> None:
    body = {
        "model": chance.choice(MODELS),
        "prompt": " ".join(f"w{chance.randrange(1, 500)}" for _ in range(chance.randint(1, 200))),
        "max_tokens": chance.randint(1, 60),
        "temperature": chance.choice([0.3, 1.0]),
        "top_p": chance.choice([0.9, 1.0]),
        "n": chance.choice([1, 1, 3]),
        "logprobs": chance.choice([None, 2]),
        "stop": chance.choice([None, ["w7", "w11"]]),
        "seed": chance.randrange(1000),
    }
    record.check("completion with settings", client.post("/v1/completions", json=body), 200, BUSY)


def stream(client: httpx.Client, path: str, body: dict[str, Any], record: Record, what: str, most: int) -> list[str]:
    """Returns at most this many lines of a streamed answer; none, and a record of it, if the request is refused."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            response.read()
            record.check(what, response, 200, BUSY)
            return []
        return [line for line in islice(response.iter_lines(), most) if line]


def streamed(client: httpx.Client, chance: random.Random, record: Record) -> None:
    body = {"model": chance.choice(MODELS), "messages": [{"role": "user", "content": "w5 w6"}]}
    body |= {"max_tokens": chance.randint(1, 60), "stream_options": {"include_usage": True}}
    if lines := stream(client, "/v1/chat/completions", body, record, "stream", sys.maxsize):
        is_whole = lines[-1] == "data: [DONE]" and not any('"error"' in line for line in lines)
        record.add("stream", "200" if is_whole else "cut off", "" if is_whole else lines[-2])


def leaves_a_stream(client: httpx.Client, chance: random.Random, record: Record) -> None:
    body = {"model": chance.choice(MODELS), "prompt": "w5", "max_tokens": 1000, "ignore_eos": True}
    what = "stream that the client leaves"
    if stream(client, "/v1/completions", body, record, what, chance.randint(1, 20)):
        record.add(what, "left")


def leaves_an_answer(client: httpx.Client, chance: random.Random, record: Record) -> None:
    body = {"model": chance.choice(MODELS), "prompt": "w5", "max_tokens": 1500, "ignore_eos": True}
    try:
        response = client.post("/v1/completions", json=body, timeout=chance.uniform(0.01, 0.3))
    except httpx.TimeoutException:
        record.add("answer that the client leaves", "left")
        return
    record.check("answer that the client leaves", response, 200, BUSY)


REFUSED: list[tuple[str, dict[str, Any], int]] = [  # path, what differs from a right request, status
    ("/v1/completions", {"model": "unknown"}, 404),
    ("/v1/completions", {"model": "small@much"}, 400),
    ("/v1/completions", {"model": "dora@1e30"}, 400),
    ("/v1/completions", {"max_tokens": 10**7}, 400),
    ("/v1/completions", {"max_tokens": -1}, 400),
    ("/v1/completions", {"n": 1000}, 400),
    ("/v1/completions", {"prompt": []}, 400),
    ("/v1/completions", {"prompt": [10**6]}, 400),
    ("/v1/completions", {"temperatur": 1}, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "../base"}, 400),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "missing"}, 404),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "loaded/broken"}, 400),
    ("/v1/load_lora_adapter", {"lora_name": "small", "lora_path": "small"}, 400),
    ("/v1/unload_lora_adapter", {"lora_name": "unknown"}, 404),
]


def refused(client: httpx.Client, chance: random.Random, record: Record) -> None:
    path, change, status = chance.choice(REFUSED)
    body = {"model": "base", "prompt": "w5", **change} if path == "/v1/completions" else change
    record.check("request that is refused", client.post(path, json=body), status)


def looked_at(client: httpx.Client, chance: random.Random, record: Record) -> None:
    path = chance.choice(["/health", "/ready", "/metrics", "/v1/models", "/"])
    record.check(path, client.get(path), 200)


ACTIONS: dict[Action, int] = {  # how often, of all of them
    greedy: 30,
    sampled: 20,
    streamed: 20,
    leaves_a_stream: 8,
    leaves_an_answer: 6,
    refused: 10,
    looked_at: 6,
}


def run_client(url: str, seed: int, end: float, record: Record) -> None:
    chance = random.Random(seed)
    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < end:
            [action] = chance.choices([*ACTIONS], [*ACTIONS.values()])
            guarded(action, client, chance, record)


def run_loader(url: str, end: float, record: Record) -> None:
    """Loads an adapter under a new name, asks it, replaces it, asks again, and unloads it."""
    chance, number = random.Random(0), 0

    def ask(client: httpx.Client, name: str, content: str) -> None:
        body = {"model": name, "prompt": "w5 w6 w7", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        response = client.post("/v1/completions", json=body)
        if record.check("completion of a loaded adapter", response, 200, BUSY):
            record.check_answer(f"loaded/{content}", response.json()["choices"][0]["text"])

    def load_and_unload(client: httpx.Client, _: random.Random, record: Record) -> None:
        name = f"loaded-{number}"
        for content in ("first", "second"):
            body = {"lora_name": name, "lora_path": f"loaded/{content}", "load_inplace": content == "second"}
            response = client.post("/v1/load_lora_adapter", json=body)
            while response.status_code == BUSY and time.monotonic() < end:
                record.check("load", response, BUSY)
                time.sleep(0.1)
                response = client.post("/v1/load_lora_adapter", json=body)
            if not record.check("load", response, 200, BUSY):
                return
            ask(client, name, content)
        record.check("unload", client.post("/v1/unload_lora_adapter", json={"lora_name": name}), 200)

    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < end:
            guarded(load_and_unload, client, chance, record)
            number += 1


def guarded(action: Action, client: httpx.Client, chance: random.Random, record: Record) -> None:
    """A connection that the server ends, or an answer that never comes, is an outcome too."""
    try:
        action(client, chance, record)
    except httpx.HTTPError as error:
        record.add(action.__name__, type(error).__name__, f"{type(error).__name__}: {error}")


# ---- The server


def start_server(folder: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Returns the process and its address, when it listens."""
    command = [sys.executable, "-m", "tailora", "serve", "--model", str(folder / "base"), "--name", "base"]
    command += ["--adapters", str(folder / "adapters"), "--adapter-memory", str(ADAPTER_MEMORY)]
    command += ["--device", "cpu", "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    for _ in range(600):
        time.sleep(0.1)
        if listening := re.search(r"listening at (http://[\d.:]+)", log.read_text()):
            return process, listening[1]
        if process.poll() is not None:
            break
    raise SystemExit(f"the server does not start:\n{log.read_text()}")


def stop_server(process: subprocess.Popen[bytes], log: Path, record: Record) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        record.add("server", "did not stop", "it runs a minute after SIGTERM")
        return
    is_right = status in (0, -signal.SIGTERM)
    record.add("server", f"stopped with {status}", "" if is_right else f"it stopped with {status}")
    if "Traceback" in (text := log.read_text()):
        record.add("server", "traceback", text[text.index("Traceback") :])


def watch_memory(process: subprocess.Popen[bytes], end: float) -> list[tuple[float, float]]:
    """Returns (seconds, MB) until the end, or until the server has ended."""
    samples, began, server = [], time.monotonic(), psutil.Process(process.pid)
    while time.monotonic() < end and process.poll() is None:
        samples.append((time.monotonic() - began, server.memory_info().rss / 1e6))
        time.sleep(SAMPLE_SECONDS)
    return samples


def memory_over_time(samples: list[tuple[float, float]]) -> dict[str, Any]:
    """The straight line through the samples after the warm-up."""
    counted = [sample for sample in samples if sample[0] >= WARM_UP * samples[-1][0]]
    line = stats.linregress(*zip(*counted, strict=True))
    return {
        "first_mb": counted[0][1],
        "last_mb": counted[-1][1],
        "slope_mb_per_hour": 3600 * line.slope,
        "standard_error": 3600 * line.stderr,
        "samples": [(round(when), round(size, 1)) for when, size in samples],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--quick", action="store_true", help=f"the result is written to {measure.QUICK}")
    arguments = parser.parse_args()
    record = Record()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_files(folder)
        process, url = start_server(folder, folder / "server.log")
        end = time.monotonic() + 60 * arguments.minutes
        threads = [threading.Thread(target=run_client, args=(url, seed, end, record)) for seed in range(CLIENTS)]
        threads.append(threading.Thread(target=run_loader, args=(url, end, record)))
        for thread in threads:
            thread.start()
        samples = watch_memory(process, end)
        if process.poll() is not None:
            record.add("server", "ended", (folder / "server.log").read_text()[-400:])
        for thread in threads:
            thread.join()
        stop_server(process, folder / "server.log", record)
        unexpected = [reason.replace(temporary, "") for reason in record.unexpected]
    results = {
        "minutes": arguments.minutes,
        "clients": CLIENTS + 1,
        "outcomes": dict(sorted(record.outcomes.items())),
        "unexpected": unexpected,
        "memory": memory_over_time(samples),
    }
    measure.log(str(measure.write(measure.QUICK / "soak.json" if arguments.quick else "soak", results)))
    measure.log(json.dumps({**results, "memory": {**results["memory"], "samples": len(samples)}}, indent=2))
    if unexpected:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
