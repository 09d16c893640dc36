"""What a run comes back with."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from tailora.data.prepare import PreparedData
from tailora.train.evaluate import Evaluation
from tailora.train.subject import Subject

IN_MEMORY = {"in_memory": True}


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The numbers of a run, and the objects that it leaves in memory, which `to_dict` leaves out."""

    output_dir: str
    steps: int
    train_tokens: int
    supervised_tokens: int
    tokens_per_second: float  # of training, without evaluations
    eval_loss_before: float | None  # None without held-out examples
    eval_loss_after: float | None
    best_step: int  # the step whose adapter was kept
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    seconds: float  # of everything, loading included
    model: Subject = field(metadata=IN_MEMORY)
    tokenizer: PreTrainedTokenizerBase = field(metadata=IN_MEMORY)
    data: PreparedData | None = field(metadata=IN_MEMORY)  # None when streaming without eval_data
    before: Evaluation | None = field(metadata=IN_MEMORY)
    after: Evaluation | None = field(metadata=IN_MEMORY)

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata}
