"""The settings by which rows become examples: one object, made once and passed along."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tailora.data.labels import Labels
from tailora.data.schemas import AUTO


@dataclass(frozen=True, slots=True)
class DataSettings:
    """How rows become examples, and which examples are held out. `TrainConfig` and TRL use the same names.

    field: key of the schema -> column.
    task: decides which schemas rows may have; auto infers it from the rows.
    labels: what the head of the model predicts, for tasks that have one.
    max_length: most tokens of an example. Longer ones are cut, texts that are trained on are divided.
    system: the system message of conversations that have none.
    assistant_only_loss: train the replies of a conversation, not all of it. completion_only_loss: train completions,
        not their prompts. None: yes to both, except that completion_only_loss=False trains everything.
    documents: whether examples of plain texts hold one text each, or pieces of all texts joined.
    validation_split, seed: share of the examples to hold out, and which.
    for_evaluation: read a pair of replies as choices, where the chosen one is right, to evaluate a language model.
    """

    field: Mapping[str, str] | None = None
    task: str = AUTO
    labels: Labels | None = None
    max_length: int = 1024
    system: str | None = None
    assistant_only_loss: bool | None = None
    completion_only_loss: bool | None = None
    documents: Literal["isolated", "concatenated"] = "isolated"
    validation_split: float = 0.05
    seed: int = 0
    for_evaluation: bool = False

    @property
    def trains_replies_alone(self) -> bool:
        if self.assistant_only_loss is not None:
            return self.assistant_only_loss
        return self.completion_only_loss is not False
