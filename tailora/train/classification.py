"""Tasks whose model has a head for labels: classes of texts, numbers, and tags of words.

    SequenceClassification   cross-entropy of the class; with several labels per row, binary cross-entropy of each
    Regression               squared error
    TokenClassification      cross-entropy of the tag, at the first token of each word

Class weights are those of torch: the loss of a step is sum(w L) / sum(w). Evaluations do without weights, so that their
losses can be compared, and keep the head's outputs of every row or word (`Outputs.scores`).
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
from tailora.data.labels import Labels, listed
from tailora.data.schemas import REGRESSION, TOKEN_CLASSIFICATION
from tailora.errors import ConfigError, nearest
from tailora.kernels.loss import Batch
from tailora.model import LoRAModel
from tailora.train.loss import BatchLayout, Evaluation, Outputs, Scores, Sums, Task
from tailora.train.trainable import FullModel


class LabelTask(Task):
    """What these tasks have in common.

    weights: of each class in the loss of training; None: all are 1.
    """

    has_head = True

    def __init__(self, labels: Labels, weights: Float64 | None = None) -> None:
        self.labels, self.weights, self.score_names = labels, weights, labels.names
        self.loss_unit = {REGRESSION: "squared error", TOKEN_CLASSIFICATION: "nats per word"}.get(
            labels.task, "nats per row"
        )

    @property
    def description(self) -> str:  # type: ignore[override]
        if self.labels.task == REGRESSION:
            return REGRESSION
        kinds = "labels, several of a row" if self.labels.several else "labels"
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
        none = torch.zeros(0, dtype=torch.int64)
        targets = np.stack([cast(Float64, example.target) for example in examples])
        return Batch(
            inputs=self.inputs(examples, layout),
            supervised=none,
            targets=torch.from_numpy(targets[:, 0].astype(np.int64)),
            columns=none,
            within_columns=None,
            owners=np.arange(len(examples)),
            extras={"targets": torch.from_numpy(targets.astype(np.float32))},
        )

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """Calls the model without a cache of keys and values, and without segments of two texts if it knows none."""
        base = model.base_model if isinstance(model, LoRAModel | FullModel) else model
        accepted = inspect.signature(base.forward).parameters
        inputs = {name: value for name, value in batch.inputs.items() if name != "token_type_ids" or name in accepted}
        return model(**inputs, **({"use_cache": False} if "use_cache" in accepted else {}))

    def start_of(self, example: Example, tokens: int, *, supervised: bool = True) -> Example:  # noqa: ARG002
        second_start = example.second_start if example.second_start < tokens else 0
        part = slice(tokens)
        return replace(
            example, input_ids=example.input_ids[part], labels=example.labels[part], second_start=second_start
        )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns what the head says of every loss of the batch, (losses, outputs of the head), at least float32."""
        logits = self.call(model, batch).logits
        return cast(Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Returns (losses,)."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, batch: Batch, layout: BatchLayout) -> Outputs:  # noqa: ARG002
        logits = self.logits(model, batch)
        return Outputs(self.losses(logits, batch), logits)

    def counts(self, examples: Examples) -> npt.NDArray[np.int64]:
        return np.ones(len(examples), dtype=np.int64)

    def targets(self, examples: Examples) -> list[Any] | None:
        return None if examples.targets is None else list(examples.targets.tolist())

    def evaluation(self, examples: Examples, sums: Sums, scores: Scores | None) -> Evaluation:
        """Returns the losses without class weights."""
        counts = self.counts(examples)
        if self.weights is not None and scores is not None:
            losses = self.unweighted(torch.from_numpy(scores), examples).numpy()
            sums = np.zeros(len(examples))
            np.add.at(sums, np.repeat(np.arange(len(examples)), counts), losses)
        return Evaluation(sums, counts, scores)

    def unweighted(self, logits: Tensor, examples: Examples) -> Tensor:
        raise NotImplementedError

    def divisor(self, example: Example) -> float:  # noqa: ARG002
        return 1.0

    def weight_tensor(self, like: Tensor) -> Tensor | None:
        return None if self.weights is None else torch.from_numpy(self.weights).to(like)


class SequenceClassification(LabelTask):
    """The class of a text, or several labels of it."""

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        weights = self.weight_tensor(logits)
        if self.labels.several:
            return _binary_losses(logits, batch.extras["targets"].to(logits), weights)
        return F.cross_entropy(logits, batch.targets, weight=weights, reduction="none")

    def unweighted(self, logits: Tensor, examples: Examples) -> Tensor:
        targets = torch.from_numpy(cast(Float64, examples.targets))
        if self.labels.several:
            return _binary_losses(logits, targets, None)
        return F.cross_entropy(logits, targets[:, 0].long(), reduction="none")

    def divisor(self, example: Example) -> float:
        if self.weights is None or self.labels.several:
            return 1.0
        return float(self.weights[int(cast(Float64, example.target)[0])])


def _binary_losses(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the mean over the labels of each row, (rows,), weighted if there are weights."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.mean(1) if weights is None else losses @ (weights / weights.sum())


class Regression(LabelTask):
    """A number."""

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return (logits - batch.extras["targets"].to(logits)).square().mean(1)


class TokenClassification(LabelTask):
    """A tag for each word."""

    def make_batch(self, examples: Sequence[Example], layout: BatchLayout) -> Batch:
        tags = collate_padded(examples, layout.pad_id)["labels"].numpy()
        owners = np.broadcast_to(np.arange(len(examples))[:, None], tags.shape)
        return Batch.of(self.inputs(examples, layout), tags, owners)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.call(model, batch).logits.flatten(0, 1).index_select(0, batch.supervised)
        return cast(Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits, batch.targets, weight=self.weight_tensor(logits), reduction="none")

    def unweighted(self, logits: Tensor, examples: Examples) -> Tensor:
        tags = examples.labels[examples.labels != IGNORED]
        return F.cross_entropy(logits, torch.from_numpy(tags.astype(np.int64)), reduction="none")

    def counts(self, examples: Examples) -> npt.NDArray[np.int64]:
        ends = np.cumsum(np.concatenate([[0], examples.labels != IGNORED]), dtype=np.int64)
        return np.diff(ends[examples.starts])

    def targets(self, examples: Examples) -> list[Any] | None:
        return [example.labels[example.labels != IGNORED].tolist() for example in examples]

    def divisor(self, example: Example) -> float:
        tags = example.labels[example.labels != IGNORED]
        return float(len(tags) if self.weights is None else self.weights[tags].sum())


def label_task(labels: Labels, weights: Float64 | None = None) -> LabelTask:
    """Returns the task of these labels."""
    tasks = {REGRESSION: Regression, TOKEN_CLASSIFICATION: TokenClassification}
    return tasks.get(labels.task, SequenceClassification)(labels, weights)


def class_weights(chosen: str | dict[str, float] | None, labels: Labels, counts: dict[str, int]) -> Float64 | None:
    """Returns the weight of each class. chosen: "balanced", by name, where others have 1, or None.

    counts: how often each class is trained on; balanced weights are in inverse proportion, with a mean of 1 per row.
    Raises ConfigError for a name that is no label.
    """
    if chosen is None:
        return None
    if chosen == "balanced":
        number = np.array([max(counts[name], 1) for name in labels.names], dtype=np.float64)
        return cast(Float64, number.sum() / (len(number) * number))
    assert isinstance(chosen, dict)
    if unknown := [name for name in chosen if name not in labels.names]:
        raise ConfigError(
            f"class_weights: {', '.join(unknown)} is no label of the data{nearest(unknown[0], labels.names)}; "
            f"there are {', '.join(labels.names)}"
        )
    return np.array([chosen.get(name, 1.0) for name in labels.names])
