"""How much a training example changes a held-out loss."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tiny_run import Settings, data_file, make_settings, model_folder, one_thread, settings  # noqa: F401

from tailora.kernels.flat_parameters import gradient_norm
from tailora.study.influence import FinishedRun, _compute_gradient, row_scores
from tailora.train.trainer import run


def test_a_score_is_the_change_of_held_out_losses_by_a_small_step(settings: Settings, tmp_path: Path) -> None:  # noqa: F811
    """TracIn (arXiv:2002.08484, sec. 3): the loss of z' changes by about -eta * grad(z') . grad(z) in a step on z.

    Here the changes of all held-out losses are added up, each divided by the norm of its gradient.
    """
    run(settings(max_steps=8, samples=0, learning_rate=1e-2))
    with ExitStack() as stack:
        finished = FinishedRun.read(tmp_path / "out").load(stack)
        assert finished.data.held_out is not None
        held_out, buffers = list(finished.data.held_out), finished.updates.buffers
        rows = [[0], [1, 2], [7]]
        scores, losses = row_scores(finished, rows, finished.data.held_out)
        norms = []
        for example in held_out:
            _compute_gradient(finished, [example])
            norms.append(float(gradient_norm(buffers)))

        def mean_of_scaled_losses() -> float:
            values = [_compute_gradient(finished, [example]) for example in held_out]
            return sum(loss / norm for loss, norm in zip(values, norms, strict=True)) / len(held_out)

        for row, score, loss in zip(rows, scores, losses, strict=True):
            examples = [finished.data.known[index] for index in row]
            assert _compute_gradient(finished, examples) == pytest.approx(loss * sum(e.supervised for e in examples))
            step = [1e-4 * buffer.gradient / gradient_norm(buffers) for buffer in buffers]
            size = 1e-4 / float(gradient_norm(buffers))
            before = [buffer.parameter.detach().clone() for buffer in buffers]
            changes = []
            for sign in (1, -1):  # the second order cancels
                with torch.no_grad():
                    for buffer, values, part in zip(buffers, before, step, strict=True):
                        buffer.parameter.copy_(values - sign * part)
                changes.append(mean_of_scaled_losses())
            with torch.no_grad():
                for buffer, values in zip(buffers, before, strict=True):
                    buffer.parameter.copy_(values)
            assert (changes[0] - changes[1]) / (2 * size) == pytest.approx(score, rel=0.05)
