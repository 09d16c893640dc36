"""Preference pairs: tailora and TRL's DPOTrainer with PEFT, on the demo's model and conversations.

    python -m benchmarks.studies.preferences        writes benchmarks/results/preferences.json
    python -m benchmarks.studies.preferences --only arm=tailora

The chosen reply is the last one of a conversation; the rejected one comes from a different conversation. All arms use
the same pairs, rank, target layers, beta, learning rate, schedule and bf16 base. The time runs from the end of loading
to the end of the last step, so it includes the reference. TRL computes the reference in every step, or once before
training. After the run, one function evaluates the held-out pairs for all arms, with the adapter that each arm saved.
Needs `pip install '.[bench]'`.
"""

import json
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import measure

if TYPE_CHECKING:
    from tailora.data.dataset import Example
    from tailora.train.config import TrainConfig

STEPS, BATCH, HELD_OUT = 6, 8, 24
BETA, RATE, MAX_LENGTH = 0.1, 1e-4, 256
REPEATS = 2
TRL_ARMS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, reference once": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": BATCH},
    "TRL, gradient checkpointing": {"precompute_ref_log_probs": True, "gradient_checkpointing": True},
}
ARMS = ("tailora", *TRL_ARMS)


def cells(quick: bool) -> list[measure.Cell]:
    common = {"threads": 1, "malloc": "default", "steps": 2 if quick else STEPS}
    return [{"repeat": repeat, "arm": arm, **common} for repeat, arm in product(range(1 if quick else REPEATS), ARMS)]


def run_cell(arm: str, repeat: int, steps: int, threads: int) -> dict[str, Any]:
    del repeat, threads
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, steps * BATCH)
        if arm == "tailora":
            clock, adapter = tailora(folder)
        else:
            clock, adapter = trl(folder, **TRL_ARMS[arm])
        peak = measure.process_memory("VmHWM")
        return {**clock, "peak_bytes": peak, **judge(folder / "eval.jsonl", adapter)}


def write_pairs(folder: Path, count: int) -> None:
    """Writes train.jsonl and eval.jsonl, with the messages of TRL's format."""
    from tailora.data.demo import data_file, eval_file

    for source, target, size in ((data_file(), "train.jsonl", count), (eval_file(), "eval.jsonl", HELD_OUT)):
        conversations = [json.loads(line)["messages"] for line in source.read_text().splitlines()]
        conversations = [messages for messages in conversations if messages[-1]["role"] == "assistant"][: size + 1]
        rows = [
            {"prompt": own[:-1], "chosen": [own[-1]], "rejected": [other[-1]]}
            for own, other in pairwise(conversations)
            if own[-1] != other[-1]
        ]
        (folder / target).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def stopwatch() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> dict[str, float]:
    wall, cpu = stopwatch()
    return {"wall": wall - start[0], "cpu": cpu - start[1]}


def tailora(folder: Path) -> tuple[dict[str, float], Path]:
    from tailora.train.events import Event, Prepared, Stepped
    from tailora.train.trainer import run

    clock: dict[str, Any] = {}

    def on_event(event: Event) -> None:
        match event:
            case Prepared():
                clock["start"] = stopwatch()
            case Stepped():
                clock["end"] = since(clock["start"])

    run(train_config(folder), on_event=on_event)
    return clock["end"], folder / "run" / "adapter"


def train_config(folder: Path) -> "TrainConfig":
    from tailora.train.config import TrainConfig

    return TrainConfig(
        data=str(folder / "train.jsonl"),
        output_dir=str(folder / "run"),
        validation_split=0,
        max_length=MAX_LENGTH,
        learning_rate=RATE,
        beta=BETA,
        per_device_train_batch_size=BATCH,
    )


def trl(folder: Path, **settings: Any) -> tuple[dict[str, float], Path]:
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from benchmarks.speed.trainers import common_settings, lora_config
    from tailora.train.model_loading import load_base

    base, tokenizer = load_base("demo")
    config = train_config(folder)
    common = {**common_settings(config), "output_dir": str(folder / "trainer")}
    arguments = {**common, "beta": BETA, "max_length": MAX_LENGTH, "gradient_checkpointing": False, **settings}
    ends: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(since(start))

    data = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    start = stopwatch()  # the reference that is computed once is computed while the trainer is made
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(**arguments),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_config(config),
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.model.save_pretrained(folder / "adapter")
    return ends[-1], folder / "adapter"


def judge(file: Path, adapter: Path) -> dict[str, float]:
    """Returns accuracy and mean margin of the rewards of held-out pairs, by transformers' own forward."""
    from tailora import LoRAModel
    from tailora.data.chat_template import DataSettings
    from tailora.data.prepare import prepare
    from tailora.train.model_loading import load_base

    base, tokenizer = load_base("demo")
    pairs = prepare(str(file), tokenizer, DataSettings(max_length=MAX_LENGTH, validation_split=0)).train
    model = LoRAModel.from_pretrained(base, adapter).eval()
    margins = []
    for pair in pairs:
        chosen, rejected = pair.sequences
        tuned = log_probability(model, chosen) - log_probability(model, rejected)
        with model.disable_adapter():
            tuned -= log_probability(model, chosen) - log_probability(model, rejected)
        margins.append(BETA * tuned)
    return {"accuracy": sum(margin > 0 for margin in margins) / len(margins), "margin": sum(margins) / len(margins)}


def log_probability(model: Any, example: "Example") -> float:
    import torch

    ids, labels = (torch.from_numpy(array)[None].long() for array in (example.input_ids, example.labels))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    targets, supervised = labels[0, 1:], labels[0, 1:] != -100
    return float(logits.log_softmax(-1)[supervised].gather(1, targets[supervised, None]).double().sum())


if __name__ == "__main__":
    measure.main("preferences", str(__doc__), cells, run_cell)
