"""The arms of real.py: tailora, PEFT with transformers' Trainer, TRL's SFTTrainer, on the same tokenised rows.

Every arm keeps adapter snapshots on its way. A watch stands still while one is written, and runs from the moment that
everything is loaded until the last step is done.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arms import FAST_OFF

from tailora.data.dataset import Examples
from tailora.train.config import TrainConfig
from tailora.train.events import Event, Prepared, Stepped
from tailora.train.model_loading import has_bfloat16
from tailora.train.trainer import run

SNAPSHOTS = 5  # on the way, the last at the end
TOKENS = 768  # of a packed row: what eight rows of the demo hold


@dataclass
class Watch:
    """Seconds of training, and where each snapshot was taken."""

    folder: Path
    wall: float = 0.0
    cpu: float = 0.0
    snapshots: list[dict[str, Any]] = field(default_factory=list)
    _since: tuple[float, float] = (0.0, 0.0)

    def go(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall += time.perf_counter() - self._since[0]
        self.cpu += time.process_time() - self._since[1]

    def stepped(self, step: int, total: int, save: Callable[[Path], Any]) -> None:
        """After every step: at each part of the run a snapshot, outside the time."""
        self.stop()
        if step in {math.ceil(total * part / SNAPSHOTS) for part in range(1, SNAPSHOTS + 1)}:
            path = self.folder / f"step-{step}"
            save(path)
            self.snapshots.append({"step": step, "wall": self.wall, "cpu": self.cpu, "path": str(path)})
        self.go()


def tailora(config: TrainConfig, watch: Watch, **settings: Any) -> None:
    """The product's run on the data's own file."""
    models: list[Any] = []

    def listen(event: Event) -> None:
        match event:
            case Prepared():
                watch.go()
            case Stepped():
                watch.stepped(event.step, event.max_steps, models[0].save_adapter)

    run(config.model_copy(update=settings), on_event=listen, on_ready=lambda model, *_: models.append(model))


def trainer(
    config: TrainConfig, watch: Watch, *, base: Any, tokenizer: Any, examples: Examples, **settings: Any
) -> None:
    """transformers' Trainer around a PEFT model; rows padded to the longest of a batch of similar lengths."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    arguments = TrainingArguments(**{**common(config, watch), "train_sampling_strategy": "group_by_length", **settings})
    Trainer(
        model=get_peft_model(base, lora(config)),
        args=arguments,
        train_dataset=dataset(examples),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[watching(watch)],
    ).train()


def trl(config: TrainConfig, watch: Watch, *, base: Any, tokenizer: Any, examples: Examples, **settings: Any) -> None:
    """TRL's SFTTrainer, which computes logits at supervised positions only; labels are given, prompts masked."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**{**common(config, watch), "gradient_checkpointing": False, **settings})
    SFTTrainer(
        model=base,
        args=arguments,
        train_dataset=dataset(examples),
        processing_class=tokenizer,
        peft_config=lora(config),
        callbacks=[watching(watch)],
    ).train()


def packed(examples: Examples) -> dict[str, Any]:
    """Whole rows packed into as many tokens as the other arms' batches hold, attention kept apart by positions."""
    length = max(TOKENS, int(examples.lengths.max()))
    return {"packing": True, "max_length": length, "per_device_train_batch_size": 1}


def common(config: TrainConfig, watch: Watch) -> dict[str, Any]:
    return {
        "output_dir": str(watch.folder / "trainer"),
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
        "bf16": has_bfloat16(),  # autocast: a tenth faster here than float32 adapters on a bf16 base without it
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }


def lora(config: TrainConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def dataset(examples: Examples) -> Any:
    from datasets import Dataset

    rows = [{"input_ids": one.input_ids.tolist(), "labels": one.labels.tolist()} for one in examples]
    return Dataset.from_list(rows)


def watching(watch: Watch) -> Any:
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.go()

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, model: Any, **__: Any) -> None:
            watch.stepped(state.global_step, state.max_steps, model.save_pretrained)

    return Watching()


ARMS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "tailora": (tailora, {}),
    "tailora, fast off": (tailora, FAST_OFF),
    "PEFT + Trainer, grouped by length": (trainer, {}),
    "TRL, grouped by length": (trl, {"train_sampling_strategy": "group_by_length", "max_length": None}),
    "TRL, packed": (trl, {"packing": True}),
}
