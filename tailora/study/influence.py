"""How much each training row of a finished run raises or lowers the held-out loss, estimated from gradients.

A small step of gradient descent on row i changes the loss of held-out example j by -rate * g_i . h_j (TracIn,
arXiv:2002.08484, sec. 3), with the gradients of their losses by the parameters of the adapter. The score of a row is

    score_i = -g_i . mean over j of h_j / ||h_j||        above 0: training on row i raises the held-out loss

All gradients belong to the finished adapter. They are compared with one direction only, so nothing needs to be stored
or projected. Three choices were made on planted wrong replies (commit eda5ab4e, benchmarks/studies/planted_rows.py):
- Every h_j has length 1. Otherwise the few held-out examples that the model cannot predict decide all scores.
- g_i keeps its length. With length 1 (as in LESS) rows unlike all others, such as another language, score about 0.
- Earlier checkpoints and AdamW's second moments did not improve the order, and most runs keep neither.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from tailora.core.attach import evaluating
from tailora.data.dataset import Example, Examples, Float64
from tailora.errors import ConfigError, FormatError
from tailora.formats.io import read_json_object
from tailora.formats.run_folder import ADAPTER, RUN
from tailora.kernels.flat_parameters import gradient_norm
from tailora.train.config import ADAPTER_FIELDS, GRPO, PER_EXAMPLE, TrainConfig
from tailora.train.dataloader import read_without
from tailora.train.kernel_choice import use_kernels
from tailora.train.loss import make_batch
from tailora.train.setup import Run, set_up

# settings of a run that change how it is computed, not what it learns
NOT_NEEDED = ("report_to", "fsdp")


@dataclass(frozen=True)
class FinishedRun:
    settings: TrainConfig  # with the run's folder as output_dir
    processes: int
    steps: int
    best_step: int  # of its adapter
    seconds: float  # of its steps
    data_sha256: str  # of its data

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        """Raises ConfigError if it has not finished, or if its rows cannot be scored."""
        if not (folder / RUN).is_file():
            raise ConfigError(f"{folder} contains no {RUN}; use the output folder of `tailora train`")
        content = read_json_object(folder / RUN)
        try:
            changes = {"output_dir": str(folder), "resume_from_checkpoint": None}
            settings = TrainConfig(**{**content["settings"], **changes})
            problems = [
                (not content["finished"], "it has not finished, so resume it first"),
                (settings.method == "full", "it trained all weights instead of an adapter"),
                (settings.task == GRPO, "it sampled its own completions"),
                (settings.streaming or settings.documents == "concatenated", "its examples do not belong to rows"),
                (content["loss_unit"] == PER_EXAMPLE, "it learned preferences"),
            ]
            for is_wrong, reason in problems:
                if is_wrong:
                    raise ConfigError(f"the rows of the run in {folder} cannot be scored: {reason}")
            result, sha256 = content["result"], content["data"]["sha256"]
            seconds = result["train_tokens"] / result["tokens_per_second"]  # also before the run was resumed
            return cls(settings, content["processes"], result["steps"], result["best_step"], seconds, sha256)
        except (KeyError, TypeError) as error:
            raise FormatError(f"{folder / RUN} was not written by this version ({error!r}); train again") from None

    def load(self, stack: ExitStack) -> Run:
        """Returns the run with its data and its final adapter, until `stack` is left. Raises ConfigError."""
        temporary = stack.enter_context(TemporaryDirectory())
        changes = {"adapter": str(Path(self.settings.output_dir) / ADAPTER), "output_dir": temporary}
        settings = self.settings.model_dump(exclude={*ADAPTER_FIELDS, *NOT_NEEDED})
        run, _ = set_up(TrainConfig(**{**settings, **changes}), stack, read=partial(read_without, (), self.data_sha256))
        return run


def row_scores(
    run: Run, rows: Sequence[Sequence[int]], held_out: Examples, log: Callable[[str], None] = lambda _: None
) -> tuple[Float64, Float64]:
    """Returns the score and the mean loss of each row; both (rows,).

    rows: indices of the training examples of each row; a long conversation has several.
    """
    buffers = run.updates.buffers
    direction = [torch.zeros_like(buffer.gradient) for buffer in buffers]
    scores, losses, counts = np.zeros(len(rows)), np.zeros(len(rows)), run.task.counts(run.data.known)
    kernels = replace(run.kernels, recomputes=False)  # one example keeps little, and recomputing takes a fifth longer
    checkpointed = run.config.gradient_checkpointing
    with evaluating(run.model), use_kernels(run.base, run.layout, kernels, checkpointed=checkpointed):
        for example in held_out:
            _compute_gradient(run, [example])
            if (norm := gradient_norm(buffers)) > 0:
                for part, buffer in zip(direction, buffers, strict=True):
                    part.add_(buffer.gradient / (norm * len(held_out)))
        for index, of_row in enumerate(rows):
            total = _compute_gradient(run, [run.data.known[i] for i in of_row])
            losses[index] = total / counts[[*of_row]].sum()
            products = zip(direction, buffers, strict=True)
            scores[index] = -sum(float((part * buffer.gradient).sum()) for part, buffer in products)
            if (index + 1) * 4 // len(rows) > index * 4 // len(rows):
                log(f"{index + 1:,} of {len(rows):,} rows scored")
    if not np.isfinite(scores).all():
        raise ConfigError("the gradients of some rows are not finite; use --dtype float32 in training")
    return scores, losses


def _compute_gradient(run: Run, examples: Sequence[Example]) -> float:
    """Fills the buffers with the gradient of the examples' losses, weighted as in training; returns the sum of them."""
    for buffer in run.updates.buffers:
        buffer.gradient.zero_()
    total = 0.0
    for example in examples:
        batch = make_batch([example], run.layout, run.accelerator.device, run.task)
        losses = run.task.outputs(run.model, batch, run.layout).losses
        torch.autograd.backward((losses if batch.loss_weights is None else losses * batch.loss_weights).sum())
        total += float(losses.detach().sum())
    return total
