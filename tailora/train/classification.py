"""Tasks whose model has a head for labels: classes of texts, numbers, and tags of words.

    LabelTask                cross-entropy of the class of a text
    SeveralLabels            binary cross-entropy of each label
    Regression               squared error
    TokenClassification      cross-entropy of the tag, at the first token of each word

Class weights work as in torch: the loss of a step is sum(w L) / sum(w). Like row weights, they are only used in
training. Evaluations keep the head's outputs of every row or word (`Outputs.scores`).
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailora.data.collate import collate_padded
from tailora.data.dataset import IGNORED, Example, Examples, Float64
from tailora.data.labels import Labels
from tailora.data.messages import listed
from tailora.data.schemas import REGRESSION, TOKEN_CLASSIFICATION
from tailora.errors import ConfigError, nearest
from tailora.kernels.loss import Batch
from tailora.model import LoRAModel
from tailora.train.loss import BatchLayout, Evaluation, Outputs, Sums, Task
from tailora.train.trainable import FullModel


class LabelTask(Task):
    """The class of a text, and what all label tasks share. weights: of each class in the training loss; None: all 1."""

    is_plain = True
    batches_by_length = False
    has_one_loss = True

    def __init__(self, labels: Labels, weights: Float64 | None = None) -> None:
        self.labels, self.weights, self.score_names = labels, weights, labels.names
        self.loss_unit = {REGRESSION: "squared error", TOKEN_CLASSIFICATION: "nats per word"}.get(
            labels.task, "nats per row"
        )

    @property
    def description(self) -> str:
        if self.labels.task == REGRESSION:
            return REGRESSION
        kinds = "labels, several per row" if self.labels.several else "labels"
        weighted = "" if self.weights is None else ", weighted"
        return f"{self.labels.task}: {len(self.labels.names)} {kinds}{weighted}: {listed(self.labels.names)}"

    def inputs(self, examples: Sequence[Example], layout: BatchLayout) -> dict[str, Any]:
        """Returns the model's arguments, padded on the right, without labels."""
        inputs = dict(collate_padded(examples, layout.pad_id))
        del inputs["labels"]
        if any(example.second_start for example in examples):
            starts = torch.tensor([example.second_start or len(example.input_ids) for example in examples])
            positions = torch.arange(inputs["input_ids"].shape[1])
            inputs["token_type_ids"] = ((positions >= starts[:, None]) & (inputs["attention_mask"] > 0)).long()
        return inputs

    def make_batch(self, examples: Sequence[Example], layout: BatchLayout) -> Batch:
        targets = np.stack([cast(Float64, example.target) for example in examples])
        batch = Batch(
            inputs=self.inputs(examples, layout),
            supervised=torch.arange(len(examples)),
            targets=torch.from_numpy(targets[:, 0].astype(np.int64)),
            columns=torch.zeros(1, dtype=torch.int64),
            within_columns=None,
            owners=np.arange(len(examples)),
            extras={"targets": torch.from_numpy(targets.astype(np.float32))},
        )
        return self.weighted(batch)

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """Calls the model without a cache of keys and values, and without segments of two texts if it knows none."""
        base = model.base_model if isinstance(model, LoRAModel | FullModel) else model
        accepted = inspect.signature(base.forward).parameters
        inputs = {name: value for name, value in batch.inputs.items() if name != "token_type_ids" or name in accepted}
        return model(**inputs, **({"use_cache": False} if "use_cache" in accepted else {}))

    def start_of(self, example: Example, tokens: int, *, supervised: bool = True) -> Example:  # noqa: ARG002
        return example.beginning(tokens)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns what the head says of every loss of the batch, (losses, outputs of the head), at least float32."""
        logits = self.call(model, batch).logits.flatten(0, -2).index_select(0, batch.supervised)
        return cast(Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Returns (losses,)."""
        return F.cross_entropy(logits, batch.targets, reduction="none")

    def outputs(self, model: nn.Module, batch: Batch, layout: BatchLayout) -> Outputs:  # noqa: ARG002
        logits = self.logits(model, batch)
        return Outputs(self.losses(logits, batch), logits)

    def targets(self, examples: Examples) -> list[Any] | None:
        return None if examples.targets is None else list(examples.targets.tolist())

    def hits(self, examples: Examples, evaluation: Evaluation) -> Sums | None:
        """Returns how many predictions of each example are right, of `counts`; None of numbers."""
        assert evaluation.scores is not None
        right = evaluation.scores.argmax(1) == self.right_classes(examples)
        owners = np.repeat(np.arange(len(examples)), evaluation.counts)
        hits: Sums = np.bincount(owners, weights=right, minlength=len(examples)).astype(np.float64)
        return hits

    def right_classes(self, examples: Examples) -> npt.NDArray[np.int64]:
        """Returns the index of the class or tag of each loss."""
        assert examples.targets is not None
        return examples.targets[:, 0].astype(np.int64)

    def divisor(self, example: Example) -> float:
        return float(self.weights_of(self.right_classes(Examples.of([example]))).sum())

    def weights_of(self, classes: npt.NDArray[np.int64]) -> Float64:
        return np.ones(len(classes)) if self.weights is None else self.weights[classes]

    def weighted(self, batch: Batch) -> Batch:
        if self.weights is None:
            return batch
        return replace(batch, loss_weights=torch.from_numpy(self.weights_of(batch.targets.numpy())).float())


class SeveralLabels(LabelTask):
    """Several labels per text, which are predicted independently. The loss of a text is the mean over the labels."""

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        targets = batch.extras["targets"].to(logits)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)

    def hits(self, examples: Examples, evaluation: Evaluation) -> Sums:
        assert evaluation.scores is not None
        right: Sums = ((evaluation.scores > 0) == examples.targets).all(1).astype(np.float64)
        return right


class Regression(LabelTask):
    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return (logits - batch.extras["targets"].to(logits)).square().mean(1)

    def hits(self, examples: Examples, evaluation: Evaluation) -> None:  # noqa: ARG002
        return None


class TokenClassification(LabelTask):
    has_one_loss = False

    def make_batch(self, examples: Sequence[Example], layout: BatchLayout) -> Batch:
        tags = collate_padded(examples, layout.pad_id)["labels"].numpy()
        owners = np.broadcast_to(np.arange(len(examples))[:, None], tags.shape)
        return self.weighted(Batch.of(self.inputs(examples, layout), tags, owners))

    def targets(self, examples: Examples) -> list[Any] | None:
        return [example.labels[example.labels != IGNORED].tolist() for example in examples]

    def right_classes(self, examples: Examples) -> npt.NDArray[np.int64]:
        tags: npt.NDArray[np.int64] = examples.labels[examples.labels != IGNORED].astype(np.int64)
        return tags


def label_task(labels: Labels, weights: Float64 | None = None) -> LabelTask:
    if labels.several:
        return SeveralLabels(labels)
    tasks = {REGRESSION: Regression, TOKEN_CLASSIFICATION: TokenClassification}
    return tasks.get(labels.task, LabelTask)(labels, weights)


def class_weights(chosen: str | dict[str, float] | None, labels: Labels, counts: dict[str, int]) -> Float64 | None:
    """Returns the weight of each class. chosen: "balanced", by name, where others have 1, or None.

    counts: how often each class is trained on; balanced weights are in inverse proportion, with a mean of 1 per row.
    Raises ConfigError for a name that is no label.
    """
    if chosen is None:
        return None
    if labels.several:
        raise ConfigError("--class-weights needs one label per row, but some rows have several; remove --class-weights")
    if chosen == "balanced":
        number = np.array([max(counts[name], 1) for name in labels.names], dtype=np.float64)
        return cast(Float64, number.sum() / (len(number) * number))
    assert isinstance(chosen, dict)
    if unknown := [name for name in chosen if name not in labels.names]:
        raise ConfigError(
            f"--class-weights: unknown label {', '.join(unknown)}; the data's labels are {', '.join(labels.names)}"
            f"{nearest(unknown[0], labels.names)}"
        )
    return np.array([chosen.get(name, 1.0) for name in labels.names])
