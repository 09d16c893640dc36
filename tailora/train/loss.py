"""Losses of examples, for training and for held-out evaluation.

    examples -> `make_batch`: one packed row (1, total), or padded rows (batch, longest)
             -> `ModelWithLoss`: the losses of the task, for the backward
             -> `evaluate`: the loss of every held-out example

A `Task` says what an example's tensors and losses are. `CausalLM`, the usual one, has a loss in nats for each
supervised token: position i predicts token i + 1. No example trains its first token, so no prediction crosses a
boundary. Other tasks are in train/preference.py and train/classification.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tailora.core.attach import evaluating
from tailora.core.float32_products import float32_products
from tailora.core.inference import constant_adapters
from tailora.data.collate import collate_packed, collate_padded
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.errors import CheckpointError
from tailora.formats.io import write_file
from tailora.formats.run_folder import REFERENCE
from tailora.kernels.attention import packed_rows, padded_rows
from tailora.kernels.loss import FORMS, Batch, LossForm
from tailora.model import LoRAModel
from tailora.train.config import NATS_PER_TOKEN
from tailora.train.trainable import FullModel, Trainable

Sums = npt.NDArray[np.float64]  # (examples,), of the losses of each example
TaskScores = npt.NDArray[np.float64]  # (losses, numbers)
READ_EVERY = 32  # batches of an evaluation: the host waits for the device only then


class Outputs(NamedTuple):
    losses: Tensor  # (losses,), at least float32
    scores: Tensor | None = None  # (losses, numbers), what else an evaluation keeps of each


Reduce = Callable[[Tensor], Tensor]  # numbers of this rank -> their sums over all ranks


class Task(ABC):
    """What is learned from examples.

    The loss of a step is the sum of all its losses, divided by the sum of `divisor` over its examples.
    """

    loss_unit: str
    has_one_loss = False  # whether an example has one loss, instead of one for each supervised token
    score_names: tuple[str, ...] = ()  # of the columns of `Outputs.scores`
    is_plain = False  # whether batches are padded, and the model computes with its own layers and outputs
    # whether examples of similar length share a batch; if length correlates with the label, steps see a single class
    batches_by_length = True
    reference: "Reference | None" = None  # what the model gave examples before training, if losses compare with it

    @property
    def description(self) -> str:
        """What is learned, for the run's header; "" for the usual task."""
        return ""

    @abstractmethod
    def make_batch(self, examples: Sequence[Example], layout: "BatchLayout") -> Batch:
        """Returns what the model reads and its losses need, on the CPU."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch, layout: "BatchLayout") -> Outputs:
        """Returns the losses of a batch, in the order of its `owners`."""

    def counts(self, examples: Examples) -> npt.NDArray[np.int64]:
        """Returns how many losses each example has, (examples,)."""
        return np.ones(len(examples), dtype=np.int64) if self.has_one_loss else examples.supervised

    def divisor(self, example: Example) -> float:
        """Returns what an example adds to the number that the loss of its step is divided by; by default its losses."""
        return 1.0 if self.has_one_loss else example.supervised

    def trained_sequences(self, example: Example) -> Sequence[Example]:
        """Returns what of an example gets a gradient; by default all of it, as one sequence."""
        return (example,)

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """Returns the model's own output."""
        return model(**batch.inputs)

    def start_of(self, example: Example, tokens: int, *, supervised: bool = True) -> Example:
        """Returns the first tokens of an example, to try or measure the model on; by default all are trained."""
        return Example.of_text(example.input_ids[:tokens], supervised)

    def targets(self, examples: Examples) -> list[Any] | None:
        """Returns the expected output of each example, to store with the model's; None if there is none."""
        del examples
        return None

    def hits(self, examples: Examples, evaluation: "Evaluation") -> Sums | None:
        """Returns how many predictions of each example are right; None if there are none, or scores were not kept."""
        del examples, evaluation
        return None

    def complete_step(
        self, model: nn.Module, batches: Sequence[Batch], layout: "BatchLayout", reduce: Reduce
    ) -> Sequence[Batch]:
        """Returns this rank's batches of a step with what their losses need of the whole step; no gradients."""
        del model, layout, reduce
        return batches

    def evaluation(self, examples: Examples, sums: Sums, scores: TaskScores | None) -> "Evaluation":
        """Returns what the outputs of all examples come to."""
        return Evaluation(sums, self.counts(examples), scores)

    def without_reference(self) -> "Task":
        """Returns the task for which the model gave 0 before training: it takes the same memory and time."""
        return self if self.reference is None else replace(cast(Any, self), reference=None)

    def evaluation_before_training(self, examples: Examples) -> "Evaluation | None":
        """Returns the same of the model before training, if the reference tells it; None if the model must be run."""
        del examples
        return None


class Reference:
    """What the model gave examples before training: the log-probabilities of both sequences, by the example's hash."""

    def __init__(self) -> None:
        self._values: dict[bytes, npt.NDArray[np.float64]] = {}  # (2,) each

    def add(self, examples: Examples, values: TaskScores) -> None:
        """values: (examples, 2)."""
        self._values |= dict(zip(examples.hashes(), values, strict=True))

    def missing(self, examples: Examples) -> Examples:
        """Returns the examples that were not added."""
        return examples.select(i for i, key in enumerate(examples.hashes()) if key not in self._values)

    def of(self, examples: Iterable[Example]) -> TaskScores:
        """Returns (examples, 2). Raises KeyError for an example that was not added."""
        return np.array([self._values[example.hash] for example in examples])

    def write(self, folder: Path) -> None:
        """Raises WriteError."""
        hashes = np.frombuffer(b"".join(self._values), dtype=np.uint8).reshape(-1, 32)
        file = BytesIO()
        np.savez(file, hashes=hashes, log_probabilities=np.array([*self._values.values()]))
        write_file(folder / REFERENCE, file.getvalue())

    def read(self, folder: Path) -> None:
        """Reads what `write` has written, if it is there. Raises CheckpointError if it cannot be read."""
        path = folder / REFERENCE
        if not path.exists():
            return
        try:
            arrays = np.load(path)
            hashes, values = arrays["hashes"], arrays["log_probabilities"]
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); delete it, and its contents will be recomputed"
            ) from None
        self._values = dict(zip((row.tobytes() for row in hashes), values, strict=True))


# ---- Language models


class CausalLM(Task):
    """Predicts the next token: a loss for each supervised token."""

    loss_unit = NATS_PER_TOKEN

    def make_batch(self, examples: Sequence[Example], layout: "BatchLayout") -> Batch:
        if layout.packed:
            inputs: dict[str, Any] = collate_packed(examples, share=layout.shares_beginnings)
            owners = np.repeat(np.arange(len(examples)), inputs["cu_seq_lens_q"].diff().numpy())[None]  # (1, total)
            if "row_tokens" in inputs:
                owners = owners[:, inputs["row_tokens"].numpy()]
        else:
            inputs = dict(collate_padded(examples, layout.pad_id))
            owners = np.broadcast_to(np.arange(len(examples))[:, None], inputs["labels"].shape)
        return Batch.of(inputs, next_tokens_of(inputs.pop("labels").numpy()), owners)

    def outputs(self, model: nn.Module, batch: Batch, layout: "BatchLayout") -> Outputs:
        return Outputs(FORMS[layout.loss](model, batch))


CAUSAL_LM = CausalLM()


def next_tokens_of(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the labels shifted, so that each position has the token that it predicts: (batch, length)."""
    next_tokens = np.full_like(labels, IGNORED)
    next_tokens[:, :-1] = labels[:, 1:]
    return next_tokens


class Seq2Seq(Task):
    """Sequence to sequence (T5, BART): a loss for each token of an example's second sequence, given the first."""

    loss_unit = "nats per token"
    is_plain = True

    @property
    def description(self) -> str:
        return "sequence to sequence"

    def make_batch(self, examples: Sequence[Example], layout: "BatchLayout") -> Batch:
        sources, targets = zip(*(example.sequences for example in examples), strict=True)
        inputs: dict[str, Any] = dict(collate_padded(sources, layout.pad_id))
        del inputs["labels"]
        labels = collate_padded(targets, layout.pad_id)["labels"]
        owners = np.broadcast_to(np.arange(len(examples))[:, None], labels.shape)
        return replace(Batch.of(inputs, labels.numpy(), owners), extras={"labels": labels})

    def call(self, model: nn.Module, batch: Batch) -> Any:
        base: Any = model.base_model if isinstance(model, LoRAModel | FullModel) else model
        shifted = base.prepare_decoder_input_ids_from_labels(labels=batch.extras["labels"])
        return model(**batch.inputs, decoder_input_ids=shifted, use_cache=False)

    def outputs(self, model: nn.Module, batch: Batch, layout: "BatchLayout") -> Outputs:  # noqa: ARG002
        logits = self.call(model, batch).logits.flatten(0, 1).index_select(0, batch.supervised)
        wide = cast(Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return Outputs(F.cross_entropy(wide, batch.targets, reduction="none"))

    def start_of(self, example: Example, tokens: int, *, supervised: bool = True) -> Example:  # noqa: ARG002
        first, second = (part.beginning(tokens) for part in example.sequences)
        return Example.of_two(first, second)


SEQ2SEQ_TASK = Seq2Seq()


@dataclass(frozen=True)
class BatchLayout:
    """How examples become the model's input, and how losses are computed from its output."""

    packed: bool
    loss: LossForm
    pad_id: int
    attention: str | None = None  # what computes it for packed rows: see `kernels.attention.packed_rows`
    float32_from: int | None = None  # tokens, from which on 16-bit products are computed in float32; None: never
    shares_beginnings: bool = False  # of packed documents, such as a system message: see `collate_packed`

    @contextmanager
    def used_by(self, base: PreTrainedModel) -> Iterator[None]:
        """Within the block the model computes batches of this layout; afterwards it is restored."""
        attention = packed_rows(base, self.attention) if self.packed else padded_rows(base)
        with attention, float32_products(self.float32_from):
            yield


class ModelWithLoss(nn.Module):
    """Calls a model with a batch and returns losses, so that a wrapper of modules (DDP) sees one forward."""

    def __init__(self, model: nn.Module, layout: BatchLayout, task: Task = CAUSAL_LM) -> None:
        super().__init__()
        self.model, self.layout, self.task = model, layout, task

    def forward(self, batch: Batch) -> Tensor:
        return self.task.outputs(self.model, batch, self.layout).losses


def make_batch(examples: Sequence[Example], layout: BatchLayout, device: torch.device, task: Task = CAUSAL_LM) -> Batch:
    """Returns the model's input and what its losses need. All that depends on them is computed on the host."""
    batch = task.make_batch(examples, layout)
    weights = np.array([example.weight for example in examples], dtype=np.float32)
    if (weights != 1).any():
        of_losses = torch.from_numpy(weights[batch.owners])
        of_losses = of_losses if batch.loss_weights is None else of_losses * batch.loss_weights
        batch = replace(batch, loss_weights=of_losses)
    return batch.to(device)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Summed losses, and their number, of every example: nats and supervised tokens, unless the task says otherwise."""

    sums: Sums
    counts: npt.NDArray[np.int64]
    scores: TaskScores | None = None  # in the order of the examples; see `Task.score_names`
    metric: float | None = None  # that chooses the step, if it is not the loss

    @property
    def loss(self) -> float:
        """The mean of all losses."""
        return self.loss_of(None)

    def loss_of(self, examples: npt.NDArray[np.int64] | None) -> float:
        """Returns the mean loss of the examples with these indices, or of all."""
        chosen = slice(None) if examples is None else examples
        return float(self.sums[chosen].sum() / self.counts[chosen].sum())


def evaluate(
    model: Trainable,
    examples: Examples,
    *,
    layout: BatchLayout,
    token_budget: int,
    task: Task = CAUSAL_LM,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Evaluation:
    """Returns the loss of every example without dropout or gradients; bitwise the same each time.

    token_budget: most tokens in one forward, padding included; a longer example is computed alone. With the budget of
    training, evaluation needs no more memory than training.
    progress: called with the number of examples done and their total.
    """
    done, device = 0, next(model.parameters()).device
    sums = np.zeros(len(examples))
    unread: list[tuple[npt.NDArray[np.int64], Outputs]] = []  # index of the example of each loss; the losses
    owners: list[npt.NDArray[np.int64]] = []
    scores: list[TaskScores] = []
    with _without_gradients(model, layout):
        for indices in batches_within(token_budget, examples, layout):
            batch = make_batch([examples[i] for i in indices], layout, device, task)
            unread.append((indices[batch.owners], task.outputs(model, batch, layout)))
            done += len(indices)
            if len(unread) == READ_EVERY or done == len(examples):
                of_losses = np.concatenate([indices for indices, _ in unread])
                np.add.at(sums, of_losses, _numbers([outputs.losses for _, outputs in unread]))
                if task.score_names:
                    owners.append(of_losses)
                    scores.append(_numbers([cast(Tensor, outputs.scores) for _, outputs in unread]))
                unread.clear()
            progress(done, len(examples))
    if not scores:
        return task.evaluation(examples, sums, None)
    order = np.argsort(np.concatenate(owners), kind="stable")
    return task.evaluation(examples, sums, np.concatenate(scores)[order])


@contextmanager
def _without_gradients(model: Trainable, layout: BatchLayout) -> Iterator[None]:
    base = cast(PreTrainedModel, model.base_model)
    with torch.no_grad(), evaluating(model), constant_adapters(base), layout.used_by(base):
        yield


def repeat_forward(model: Trainable, example: Example, layout: BatchLayout, task: Task, times: int) -> None:
    """Takes part in forward passes of `evaluate` on other ranks, which need all ranks if the base is sharded."""
    with _without_gradients(model, layout):
        for _ in range(times):
            task.outputs(model, make_batch([example], layout, next(model.parameters()).device, task), layout)


def _numbers(tensors: Sequence[Tensor]) -> npt.NDArray[np.float64]:
    """Returns the tensors one after another, read from the device."""
    numbers: npt.NDArray[np.float64] = torch.cat(list(tensors)).cpu().double().numpy()
    return numbers


def batches_within(token_budget: int, examples: Examples, layout: BatchLayout) -> Iterator[npt.NDArray[np.int64]]:
    """Yields indices of examples, each batch within the budget.

    The longest come first, so that a lack of memory shows at once. If packed rows share beginnings, examples with the
    same beginning, such as the replies to a question, come one after another instead.
    """
    batch: list[int] = []
    tokens, lengths = 0, examples.lengths
    order = np.argsort(-lengths, kind="stable").tolist()
    if layout.shares_beginnings:
        order.sort(key=lambda i: examples[i].input_ids.tobytes())
    for i in order:
        width = int(lengths[i] if layout.packed or not batch else lengths[batch[0]])
        if batch and tokens + width > token_budget:
            yield np.array(batch)
            batch, tokens, width = [], 0, int(lengths[i])
        batch.append(i)
        tokens += width
    if batch:
        yield np.array(batch)
