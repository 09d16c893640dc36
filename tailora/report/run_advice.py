"""What to change in the next run, as far as the curves of this one show it: flags, and why.

    the model became worse    remedy_of
    it became better          advice_of

Each kind of advice was followed on data of several kinds (benchmarks/studies/advice.py): it helped in most cases.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tailora.evaluation.statistics import FEW_EXAMPLES
from tailora.report.format import learning_rate
from tailora.study.config import FIRST_RATES, LORA

FEWEST_POINTS = 4  # of a curve
ROSE, FELL = 0.05, 0.1  # nats per token: after the lowest point of the curve, and after its first third
USUAL_RATE = 3e-4  # a lower one is raised before the run gets longer
LEARNED = 0.5  # training loss / held-out loss, below which a model knows its rows by heart


def remedy_of(settings: Mapping[str, Any], losses: Sequence[float]) -> tuple[str, list[str]]:
    """Returns why a run probably made the model worse, and flags to try. losses: of each step, before its update."""
    if _last_quarter(losses) < losses[0]:
        steps = str(max(len(losses) // 10, 1))
        cause = "The training loss fell, so the model overfits, or the examples differ from the held-out ones."
        return f"{cause} Use --eval-steps {steps} to keep the best step, or use fewer steps.", ["--eval-steps", steps]
    now = settings["learning_rate"]
    rate = learning_rate(min(now / 10, FIRST_RATES[settings.get("method", LORA)]))
    cause = f"The training loss did not fall: the learning rate {now:g} is too high."
    return f"{cause} Use --learning-rate {rate}.", ["--learning-rate", rate]


def advice_of(
    settings: Mapping[str, Any], losses: Sequence[float], curve: Sequence[tuple[int, float]], examples: int
) -> tuple[str, list[str]]:
    """Returns what would lower the held-out loss further, and flags to try; "" if the curves do not show it.

    losses: of each step, before its update. curve: (step, held-out loss in nats per token), with the step before
    training and the last one. examples: held-out ones.
    """
    if examples < FEW_EXAMPLES or len(curve) < FEWEST_POINTS:
        return "", []
    best, lowest = min(curve, key=lambda point: point[1])
    steps, last = curve[-1]
    # the learning rate falls to 0, so even a run that is much too short ends with a flat curve
    fell = next(loss for step, loss in curve if step >= steps // 3) - last
    keeps_best = bool(settings.get("eval_steps"))  # so the end of the curve is not the adapter's
    if last > lowest + ROSE and best > 0 and not keeps_best:
        return f"The held-out loss rose after step {best:,}: try --max-steps {best}.", ["--max-steps", str(best)]
    if fell >= FELL and settings["learning_rate"] < USUAL_RATE:
        rate = learning_rate(USUAL_RATE)
        return f"The held-out loss fell until the end: try --learning-rate {rate}.", ["--learning-rate", rate]
    if fell >= FELL:
        return f"The held-out loss fell until the end: try --max-steps {2 * steps}.", ["--max-steps", str(2 * steps)]
    if _last_quarter(losses) < LEARNED * last:
        return "The training loss is less than half of the held-out loss: more rows would help most.", []
    return "", []


def _last_quarter(losses: Sequence[float]) -> float:
    last = losses[-max(len(losses) // 4, 1) :]
    return sum(last) / len(last)
