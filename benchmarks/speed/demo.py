"""The demo's run beside a hand-written loop around PEFT, and the time of the imports.

    python -m benchmarks.speed.demo run [--repeats 3]     writes benchmarks/results/demo.json

The PEFT loop is written to be fast. It has the same examples in the same order, grouped by length, a bf16 base, logits
only where there is a label, and the same rank, target layers, learning rate and schedule. Held-out losses are computed
before and after training, outside the time.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any

from benchmarks import measure
from tailora.cli.main import ENVIRONMENT

os.environ.update({**ENVIRONMENT, **os.environ})  # for both arms, before torch is loaded


def tailora() -> dict[str, float]:
    from tailora.cli.train import DEFAULTS
    from tailora.train.config import TrainConfig
    from tailora.train.trainer import run

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = run(TrainConfig(**{**DEFAULTS, "eval_data": "demo", "output_dir": f"{folder}/run"}))
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
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy

    from tailora.cli.train import DEFAULTS
    from tailora.data.chat_template import DataSettings
    from tailora.data.collate import collate_padded
    from tailora.data.demo import data_file, eval_file
    from tailora.data.prepare import prepare
    from tailora.train.config import TrainConfig
    from tailora.train.dataloader import plan_batches
    from tailora.train.model_loading import load_base
    from tailora.train.optimizer import learning_rate

    started = time.perf_counter()
    config = TrainConfig(**DEFAULTS)
    base, tokenizer = load_base("demo", "auto")
    settings = DataSettings(max_length=config.max_length)
    data = prepare(str(data_file()), tokenizer, settings, eval_source=str(eval_file()))
    torch.manual_seed(config.seed)
    settings = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": "all-linear"}
    model = get_peft_model(base, LoraConfig(**settings, task_type="CAUSAL_LM"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)

    def losses(indices: Any, examples: Any) -> torch.Tensor:
        batch = collate_padded([examples[int(i)] for i in indices], tokenizer.pad_token_id)
        targets = batch["labels"][:, 1:]
        supervised = targets != -100
        hidden = base.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        logits = base.lm_head(hidden[:, :-1][supervised])  # (supervised, vocabulary)
        return cross_entropy(logits.float(), targets[supervised], reduction="none")

    def held_out() -> float:
        model.eval()
        with torch.no_grad():
            parts = [losses(range(at, at + 4), data.eval) for at in range(0, len(data.eval), 4)]
        model.train()
        return float(torch.cat(parts).double().mean())

    before = held_out()
    batches = plan_batches(data.train.lengths, batch_size=config.per_device_train_batch_size, seed=config.seed, epoch=0)
    training_started = time.perf_counter()
    for number, indices in enumerate(batches):
        loss = losses(indices, data.train).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        rate = learning_rate(number, len(batches), config.learning_rate, config.warmup_ratio, config.lr_scheduler_type)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - training_started
    tokens = int(data.train.lengths.sum())
    return {
        "train_seconds": seconds,
        "train_tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "loss_before": before,
        "loss_after": held_out(),
        "peak_gigabytes": measure.peak_gigabytes(),
        "seconds": time.perf_counter() - started,
    }


def startup() -> dict[str, float]:
    """Returns CPU seconds of the imports and of --help, each in a new interpreter, relative to that of torch."""
    import resource
    import subprocess

    def cpu(code: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    cpu(["-c", "import torch"])  # fills the caches of compiled files and of the disk
    torch = cpu(["-c", "import torch"])
    tailora = cpu(["-c", "import torch; from tailora import LoRAConfig, LoRALayer, LoRAModel"])
    return {
        "import_torch": torch,
        "import_tailora_over_torch": tailora / torch,
        "help_over_torch": cpu(["-m", "tailora.cli", "--help"]) / torch,
        "import_peft_over_torch": cpu(["-c", "import peft"]) / torch,
    }


ARMS = {"tailora": tailora, "peft": peft, "startup": startup}


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
