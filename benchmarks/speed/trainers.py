"""Whole runs on the same tokenised rows: tailora, a loop around PEFT, transformers' Trainer and TRL's SFTTrainer.

Every arm writes snapshots of its adapter on its way. A stopwatch runs from the moment when everything is loaded until
the last step is done, and pauses while a snapshot is written.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.speed.arms import FAST_OFF
from tailora.core.device import has_bfloat16
from tailora.data.collate import collate_padded
from tailora.data.dataset import Example, Examples
from tailora.train.config import TrainConfig
from tailora.train.dataloader import plan_batches
from tailora.train.events import Event, Prepared, Stepped
from tailora.train.optimizer import learning_rate
from tailora.train.trainer import run

SNAPSHOTS = 5  # evenly spaced, the last after the last step
TOKENS = 768  # of a packed row: as many as eight rows of the demo have


@dataclass
class Stopwatch:
    """Seconds of training, and the snapshots with the seconds at which they were taken."""

    folder: Path
    wall: float = 0.0
    cpu: float = 0.0
    snapshots: list[dict[str, Any]] = field(default_factory=list)
    _since: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall += time.perf_counter() - self._since[0]
        self.cpu += time.process_time() - self._since[1]

    def after_step(self, step: int, total: int, save: Callable[[Path], Any]) -> None:
        """Takes a snapshot if it is time for one; this does not count as training."""
        self.stop()
        if step in {math.ceil(total * part / SNAPSHOTS) for part in range(1, SNAPSHOTS + 1)}:
            path = self.folder / f"step-{step}"
            save(path)
            self.snapshots.append({"step": step, "wall": self.wall, "cpu": self.cpu, "path": str(path)})
        self.start()


def tailora(config: TrainConfig, watch: Stopwatch, **settings: Any) -> None:
    """tailora's own run on the file of the data."""
    models: list[Any] = []

    def on_event(event: Event) -> None:
        match event:
            case Prepared():
                watch.start()
            case Stepped():
                watch.after_step(event.step, event.max_steps, models[0].save_adapter)

    run(config.model_copy(update=settings), on_event=on_event, on_ready=lambda model, *_: models.append(model))


def peft_loop(
    config: TrainConfig, watch: Stopwatch, *, base: Any, tokenizer: Any, examples: Examples, passes: int = 1
) -> None:
    """A loop around PEFT that is written to be fast: rows grouped by length, logits only where there is a label."""
    from peft import get_peft_model

    torch.manual_seed(config.seed)
    model = get_peft_model(base, lora_config(config)).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    grouping = {"batch_size": config.per_device_train_batch_size, "seed": config.seed}
    total = passes * len(plan_batches(examples.lengths, **grouping, epoch=0))
    schedule = total, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
    batches = (batch for epoch in range(passes) for batch in plan_batches(examples.lengths, **grouping, epoch=epoch))
    watch.start()
    for number, batch in enumerate(batches):
        padded_losses(base, [examples[int(i)] for i in batch], tokenizer.pad_token_id).mean().backward()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, *schedule)
        optimizer.step()
        optimizer.zero_grad()
        watch.after_step(number + 1, total, model.save_pretrained)


def padded_losses(base: Any, examples: Sequence[Example], pad_id: int) -> Tensor:
    """Returns the loss of every supervised token."""
    batch = collate_padded(examples, pad_id)
    targets = batch["labels"][:, 1:]
    supervised = targets != -100
    hidden = base.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    logits = base.lm_head(hidden[:, :-1][supervised])  # (supervised, vocabulary)
    return cross_entropy(logits.float(), targets[supervised], reduction="none")


def trainer(
    config: TrainConfig, watch: Stopwatch, *, base: Any, tokenizer: Any, examples: Examples, **settings: Any
) -> None:
    """transformers' Trainer around a PEFT model; rows padded to the longest of a batch of similar lengths."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    arguments = TrainingArguments(
        **{**common_settings(config), "train_sampling_strategy": "group_by_length", **settings}
    )
    Trainer(
        model=get_peft_model(base, lora_config(config)),
        args=arguments,
        train_dataset=dataset(examples),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[stopwatch_callback(watch)],
    ).train()


def trl(
    config: TrainConfig, watch: Stopwatch, *, base: Any, tokenizer: Any, examples: Examples, **settings: Any
) -> None:
    """TRL's SFTTrainer, which computes logits only where there is a label; prompts are masked."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**{**common_settings(config), "gradient_checkpointing": False, **settings})
    SFTTrainer(
        model=base,
        args=arguments,
        train_dataset=dataset(examples),
        processing_class=tokenizer,
        peft_config=lora_config(config),
        callbacks=[stopwatch_callback(watch)],
    ).train()


def packing_settings(examples: Examples) -> dict[str, Any]:
    """Returns settings that pack whole rows into as many tokens as the other arms' batches have.

    Positions keep the attention of each row apart from its neighbors.
    """
    length = max(TOKENS, int(examples.lengths.max()))
    return {"packing": True, "max_length": length, "per_device_train_batch_size": 1}


# of the benchmarks, whatever the defaults are
SAME_WORK: dict[str, Any] = {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 8}


def common_settings(config: TrainConfig) -> dict[str, Any]:
    return {
        "output_dir": config.output_dir,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "num_train_epochs": 1,
        "optim": "adamw_torch_fused",
        "seed": config.seed,
        "use_cpu": True,
        "bf16": has_bfloat16(),  # autocast: a tenth faster here than float32 adapters on a bf16 base
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }


def lora_config(config: TrainConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def dataset(examples: Examples) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()} for example in examples]
    )


def stopwatch_callback(watch: Stopwatch) -> Any:
    from transformers import TrainerCallback

    class StopwatchCallback(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, model: Any, **__: Any) -> None:
            watch.after_step(state.global_step, state.max_steps, model.save_pretrained)

    return StopwatchCallback()


ARMS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "tailora": (tailora, {}),
    "tailora, fast off": (tailora, FAST_OFF),
    "PEFT + Trainer, grouped by length": (trainer, {}),
    "TRL, grouped by length": (trl, {"train_sampling_strategy": "group_by_length", "max_length": None}),
    "TRL, packed": (trl, {"packing": True}),
}
