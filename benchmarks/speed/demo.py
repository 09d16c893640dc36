"""The demo's run compared with a hand-written loop around PEFT.

    python -m benchmarks.speed.demo run [--repeats 3]     writes benchmarks/results/demo.json

The PEFT loop is written to be fast. It has the same examples in the same order, grouped by length, a bf16 base, logits
only where there is a label, and the same rank, target layers, learning rate and schedule. Held-out losses are computed
before and after training, outside the time.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from tailora.cli.main import ENVIRONMENT

os.environ.update({**ENVIRONMENT, **os.environ})  # for both arms, before torch is loaded


def tailora() -> dict[str, float]:
    from benchmarks.speed.trainers import SAME_WORK
    from tailora.cli.train import DEFAULTS
    from tailora.train.config import TrainConfig
    from tailora.train.trainer import run

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = run(TrainConfig(**{**DEFAULTS, **SAME_WORK, "eval_data": "demo", "output_dir": f"{folder}/run"}))
    return {
        "train_seconds": result.train_tokens / result.tokens_per_second,
        "train_tokens": result.train_tokens,
        "tokens_per_second": result.tokens_per_second,
        "loss_before": float(result.eval_loss_before or 0),
        "loss_after": float(result.eval_loss_after or 0),
        "peak_gigabytes": measure.peak_gigabytes(),
        "seconds": time.perf_counter() - started,
    }


def peft() -> dict[str, float]:
    import torch

    from benchmarks.speed.trainers import SAME_WORK, Stopwatch, padded_losses, peft_loop
    from tailora.cli.train import DEFAULTS
    from tailora.data.chat_template import DataSettings
    from tailora.data.demo import data_file, eval_file
    from tailora.data.prepare import prepare
    from tailora.train.config import TrainConfig
    from tailora.train.model_loading import load_base

    started = time.perf_counter()
    config = TrainConfig(**DEFAULTS, **SAME_WORK)
    base, tokenizer = load_base("demo", "auto")
    settings = DataSettings(max_length=config.max_length)
    data = prepare(str(data_file()), tokenizer, settings, eval_source=str(eval_file()))

    def held_out() -> float:
        base.eval()
        held = [data.eval[i] for i in range(len(data.eval))]
        with torch.no_grad():
            parts = [padded_losses(base, held[at : at + 4], tokenizer.pad_token_id) for at in range(0, len(held), 4)]
        return float(torch.cat(parts).double().mean())

    before = held_out()
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch(Path(folder))
        peft_loop(config, watch, base=base, tokenizer=tokenizer, examples=data.train)
    tokens = int(data.train.lengths.sum())
    return {
        "train_seconds": watch.wall,
        "train_tokens": tokens,
        "tokens_per_second": tokens / watch.wall,
        "loss_before": before,
        "loss_after": held_out(),
        "peak_gigabytes": measure.peak_gigabytes(),
        "seconds": time.perf_counter() - started,
    }


ARMS = {"tailora": tailora, "peft": peft}


def main() -> None:
    options = measure.arm_arguments(str(__doc__))
    if options.command == "arm":
        print(json.dumps(ARMS[options.name]()))
        return
    runs = measure.run_arms("benchmarks.speed.demo", list(ARMS), options.repeats)
    summaries = {arm: measure.summary(runs_of_arm) for arm, runs_of_arm in runs.items()}
    print(measure.write("demo", {"summary": summaries, "runs": runs}))


if __name__ == "__main__":
    main()
