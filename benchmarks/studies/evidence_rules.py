"""The statements about LoRA that evidence.py checks, and the rules of their verdicts, written before the runs.

A verdict is "holds", "does not hold" or "cannot tell", by a 95% interval and a margin: a difference below the margin
does not matter in practice. Losses are nats per token of held-out examples, or minus the mean reward of held-out
prompts, at each arm's own best learning rate. An arm is tuned if half and twice its best rate were tried; without that
there is no verdict.

    better      X is better than Y. Holds: the interval of X - Y is below 0, and the difference is a margin or more.
                Does not hold: the whole interval is above -margin.
    equal       X and Y are equally good. Holds: the whole interval is within the margin. Does not hold: the interval
                excludes 0, and the difference is a margin or more.
    enough      Y is not better than X, where more is better. Holds: the whole interval of X - Y is above -margin. Does
                not hold: the interval is below 0, and the difference is a margin or more.
    inside      a number is in a range. Holds: the interval is inside. Does not hold: it is outside.

Of a statement as a whole: it holds if it does with both models and fails nowhere; it does not hold if it fails
somewhere and holds nowhere; it depends if it holds in one place and fails in another. Otherwise it is "cannot tell".
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.studies.evidence_data import FULL, MODEL_OF, PLAIN
from tailora.evaluation.statistics import difference_over_seeds

HOLDS, FAILS, UNCLEAR, DEPENDS = "holds", "does not hold", "cannot tell", "depends"
MARGIN = 0.02  # nats per token, as in `tailora compare`
REWARD_MARGIN = 0.05  # of a reward between 0 and 1
TEN_TIMES = (5.0, 20.0)  # what "about 10 times" includes
LESS = 0.9  # of full fine-tuning's KL: what "forgets less" needs
MORE_INTRUDERS = 0.5  # of the 10 leading directions of a matrix
DRAWS = 2000

Result = Mapping[str, Any]  # of a study, as evidence.py writes it
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """What one setting shows of a statement. quantity: what the numbers are.    remark: why there is no verdict."""

    statement: str
    setting: str
    quantity: str
    value: float
    low: float
    high: float
    verdict: str
    remark: str = ""


# ---- Rules


def better(value: float, low: float, high: float, margin: float = MARGIN) -> str:
    """low, high: of X - Y, where less is better."""
    if high < 0 and value <= -margin:
        return HOLDS
    return FAILS if low > -margin else UNCLEAR


def equal(value: float, low: float, high: float, margin: float = MARGIN) -> str:
    if -margin < low and high < margin:
        return HOLDS
    return FAILS if (low > 0 or high < 0) and abs(value) >= margin else UNCLEAR


def enough(value: float, low: float, high: float, margin: float = REWARD_MARGIN) -> str:
    """low, high: of X - Y, where more is better."""
    return {HOLDS: FAILS, FAILS: HOLDS, UNCLEAR: UNCLEAR}[better(value, low, high, margin)]


def inside(low: float, high: float, least: float, most: float) -> str:
    if least <= low and high <= most:
        return HOLDS
    return FAILS if high < least or low > most else UNCLEAR


def overall(findings: Sequence[Finding]) -> str:
    """Returns the verdict on a statement, from the verdicts of the settings."""
    verdicts = {finding.verdict for finding in findings}
    if {HOLDS, FAILS} <= verdicts:
        return DEPENDS
    if FAILS in verdicts:
        return FAILS
    models = {MODEL_OF[finding.setting] for finding in findings if finding.verdict == HOLDS}
    return HOLDS if models == set(MODEL_OF.values()) else UNCLEAR


def all_of(verdicts: Iterable[str]) -> str:
    """Returns the verdict on a statement whose parts must all hold."""
    given = set(verdicts)
    return FAILS if FAILS in given else HOLDS if given == {HOLDS} else UNCLEAR


# ---- Numbers


def arm(result: Result, name: str) -> Mapping[str, Any]:
    return next(entry for entry in result["report"]["arms"] if entry["name"] == name)


def untuned(*arms: tuple[Result, str]) -> str:
    """Returns which of the arms (result, name) are not tuned, as a remark; "" if none."""
    names = [name for result, name in arms if not is_tuned(arm(result, name))]
    return f"the rate of {' and '.join(names)} is not tuned" if names else ""


def is_tuned(entry: Mapping[str, Any]) -> bool:
    tried, best = [float(rate) for rate in entry["rates"]], entry["learning_rate"]
    return best is not None and all(any(math.isclose(best * f, rate) for rate in tried) for f in (0.5, 2))


def sums_of(result: Result, name: str, seeds: int | None = None) -> Floats:
    """Returns the losses of the judging examples, (seeds, examples)."""
    return np.array(result["sums"][name])[:seeds]


def difference(result: Result, first: str, second: str) -> tuple[float, float, float]:
    """Returns loss of `first` - loss of `second`, and its interval over seeds and examples."""
    found = difference_over_seeds(sums_of(result, second), sums_of(result, first), result["counts"])
    return found.value, found.low, found.high


def gap_of_batches(small: Result, large: Result) -> tuple[float, float, float]:
    """Returns how much more LoRA loses against full fine-tuning with the large batch than with the small one."""
    seeds = min(len(result["sums"][PLAIN]) for result in (small, large))
    with_small, with_large = (sums_of(result, PLAIN, seeds) - sums_of(result, FULL, seeds) for result in (small, large))
    found = difference_over_seeds(with_small, with_large, small["counts"])
    return found.value, found.low, found.high


def rate_ratio(result: Result) -> tuple[float, float, float]:
    """Returns LoRA's best rate divided by full fine-tuning's, with an interval over the choosing examples.

    Between the rates that were tried, the best is the vertex of a parabola. One seed chooses rates, so that the
    interval does not contain the spread over the seeds.
    """
    counts = np.array(result["rate_counts"], dtype=np.float64)
    everything = np.ones((1, len(counts)))
    draws = np.random.default_rng(0).multinomial(len(counts), everything[0] / len(counts), size=DRAWS)
    ratios = [
        2
        ** (
            best_octaves(result["rate_sums"][PLAIN], counts, times)
            - best_octaves(result["rate_sums"][FULL], counts, times)
        )
        for times in (everything, draws)
    ]
    low, high = np.quantile(ratios[1], [0.025, 0.975])
    return float(ratios[0][0]), float(low), float(high)


def best_octaves(rate_sums: Mapping[str, Sequence[float]], counts: Floats, times: Floats) -> Floats:
    """Returns log2 of the best rate for each row of `times`, which says how often each example counts."""
    rates = sorted(rate_sums, key=float)
    octaves = np.log2([float(rate) for rate in rates])
    losses = (times @ np.array([rate_sums[rate] for rate in rates]).T) / (times @ counts)[:, None]  # (draws, rates)
    if len(rates) < 3:
        return octaves[losses.argmin(1)]
    best = losses.argmin(1).clip(1, len(rates) - 2)  # the middle of three rates
    rows = np.arange(len(losses))
    (left, middle, right), (above, lowest, beyond) = (
        (values[best - 1], values[best], values[best + 1])
        if values.ndim == 1
        else (values[rows, best - 1], values[rows, best], values[rows, best + 1])
        for values in (octaves, losses)
    )
    falls, rises = (above - lowest) / (middle - left), (beyond - lowest) / (right - middle)
    # The slopes of the parabola halfway to both neighbours; it is lowest where its slope is 0.
    vertex = (left + middle) / 2 + falls / (falls + rises).clip(1e-12) * (right - left) / 2
    return vertex.clip(left, right)


def ratio_over_seeds(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Returns the geometric mean of first / second, with the t interval of its logarithm over the seeds."""
    logs = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    centre = mean(logs)
    half = float(stats.t.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(centre), math.exp(centre - half), math.exp(centre + half)


def difference_over_seeds_alone(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean of first - second, with its paired t interval: the held-out examples count as given."""
    each = [a - b for a, b in zip(first, second, strict=True)]
    half = float(stats.t.ppf(0.975, len(each) - 1)) * stdev(each) / math.sqrt(len(each))
    return mean(each), mean(each) - half, mean(each) + half


def mean_over_matrices(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean with its bootstrap interval."""
    data = np.array(values, dtype=np.float64)
    means = data[np.random.default_rng(0).integers(len(data), size=(DRAWS, len(data)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(data.mean()), float(low), float(high)


# ---- Statements


def compared(
    statement: str,
    studies: Sequence[str],
    first: str,
    second: str,
    setting: str,
    results: Mapping[str, Result],
    rule: Callable[..., str] = better,
    quantity: str = "{first} - {second}, nats per token",
) -> list[Finding]:
    """Compares two arms of the first of the studies that is there: the loss of `first` - the loss of `second`."""
    result = next((results[study] for study in studies if study in results), None)
    if result is None or not {first, second} <= result["sums"].keys():  # an arm failed at every rate
        return []
    remark, numbers = untuned((result, first), (result, second)), difference(result, first, second)
    verdict = UNCLEAR if remark else rule(*numbers)
    return [Finding(statement, setting, quantity.format(first=first, second=second), *numbers, verdict, remark)]


def alpha(setting: str, results: Mapping[str, Result]) -> list[Finding]:
    """The parts are the comparisons with each other alpha; all have the verdict on both."""
    others = ("alpha-r", "alpha-16r")
    return joint([found for other in others for found in compared("alpha", ["alpha"], PLAIN, other, setting, results)])


def joint(parts: Sequence[Finding]) -> list[Finding]:
    verdict = all_of(part.verdict for part in parts)
    return [replace(part, verdict=verdict) for part in parts]


def rank_1_for_rewards(setting: str, results: Mapping[str, Result]) -> list[Finding]:
    """The parts are the comparisons with rank 16 and full fine-tuning. Losses are minus the rewards."""
    compare = partial(compared, "rewards", ["rewards"], setting=setting, results=results, rule=enough)
    return joint(
        [found for other in ("r16", FULL) for found in compare(other, "r1", quantity="{second} - {first}, reward")]
    )


def ten_times(setting: str, results: Mapping[str, Result]) -> list[Finding]:
    result = results.get("full")
    if result is None:
        return []
    remark, numbers = untuned((result, PLAIN), (result, FULL)), rate_ratio(result)
    verdict = UNCLEAR if remark else inside(*numbers[1:], *TEN_TIMES)
    return [Finding("rate", setting, "best rate of LoRA / of full", *numbers, verdict, remark)]


def batch(setting: str, results: Mapping[str, Result]) -> list[Finding]:
    small, large = results.get("full"), results.get("batch")
    if small is None or large is None:
        return []
    value, low, high = gap_of_batches(small, large)
    remark = untuned(*((result, name) for result in (small, large) for name in (PLAIN, FULL)))
    verdict = UNCLEAR if remark else better(-value, -high, -low)
    quantity = "(LoRA - full) with 4 times the batch - (LoRA - full), nats per token"
    return [Finding("batch", setting, quantity, value, low, high, verdict, remark)]


def forgetting(setting: str, results: Mapping[str, Result]) -> list[Finding]:
    result = results.get("full")
    if result is None:
        return []
    remark = untuned((result, PLAIN), (result, FULL))
    value, low, high = ratio_over_seeds(result["kl"][PLAIN], result["kl"][FULL])
    verdict = UNCLEAR if remark else better(value - 1, low - 1, high - 1, 1 - LESS)
    return [Finding("forgetting", setting, "KL from the base, LoRA / full", value, low, high, verdict, remark)]


def intruders(setting: str, results: Mapping[str, Result]) -> list[Finding]:
    result = results.get("intruders")
    if result is None:
        return []
    more = [entry["lora"] - entry["full"] for entry in result["matrices"].values()]
    value, low, high = mean_over_matrices(more)
    verdict = better(-value, -high, -low, MORE_INTRUDERS)
    return [Finding("intruders", setting, "of 10 directions, LoRA - full", value, low, high, verdict)]


# ---- Experiment 6, which was there before the rules


def of_grid(setting: str, cells: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Returns what the grid of experiment 6 shows: all arms at the same rates in octaves, with t intervals over seeds.

    "attention" and "mlp" train equally many parameters there; r = 4 on all layers trains fewer.
    """
    runs: dict[str, list[dict[float, float]]] = {}  # arm -> losses of each seed
    for cell in cells:
        losses = {2.0 ** int(octave): loss for octave, loss in cell["result"]["losses"].items()}
        runs.setdefault(cell["cell"]["arm"], []).append(losses)
    means = {arm: {rate: mean(run[rate] for run in of_arm) for rate in of_arm[0]} for arm, of_arm in runs.items()}
    best = {arm: min(losses, key=losses.__getitem__) for arm, losses in means.items()}

    def found(statement: str, first: str, second: str) -> Finding:
        numbers = difference_over_seeds_alone(*([run[best[arm]] for run in runs[arm]] for arm in (first, second)))
        names = [arm for arm in (first, second) if best[arm] in (min(means[arm]), max(means[arm]))]
        remark = f"the rate of {' and '.join(names)} is not tuned" if names else ""
        verdict = UNCLEAR if remark else better(*numbers)
        return Finding(statement, setting, f"{first} - {second}, nats per token", *numbers, verdict, remark)

    rates = {arm: [2 ** vertex(run) for run in runs[arm]] for arm in ("r8", FULL)}
    ratio = ratio_over_seeds(rates["r8"], rates[FULL])
    return [
        found("layers", "r4", "attention"),
        found("mlp", "mlp", "attention"),
        Finding("rate", setting, "best rate of LoRA / of full", *ratio, inside(*ratio[1:], *TEN_TIMES)),
        found("dora", "dora", "r8"),
        found("pissa", "pissa", "r8"),
    ]


def vertex(losses: Mapping[float, float]) -> float:
    """Returns log2 of the best rate. losses: by rate."""
    once = np.ones((1, 1))
    return float(best_octaves({repr(rate): [loss] for rate, loss in losses.items()}, once[0], once)[0])


STATEMENTS: dict[str, tuple[str, Callable[[str, Mapping[str, Result]], list[Finding]]]] = {
    "alpha": ("alpha = 2r is the best choice: alpha = r and alpha = 16r are worse", alpha),
    "layers": (
        "All linear layers: attention alone, with as many parameters, is worse",
        partial(compared, "layers", ["layers"], PLAIN, "attention"),
    ),
    "mlp": (
        "The MLP matters more than attention, with as many parameters",
        partial(compared, "mlp", ["layers"], "mlp", "attention"),
    ),
    "rate": ("LoRA needs about 10 times the learning rate of full fine-tuning (5 to 20 times)", ten_times),
    "rank": (
        "The rank does not matter for small data: r = 1 is as good as r = 64",
        partial(compared, "rank", ["rank", "few"], "r1", "r64", rule=equal),
    ),
    "dora": ("DoRA is better than LoRA", partial(compared, "dora", ["dora"], "dora", PLAIN)),
    "pissa": ("PiSSA is better than LoRA", partial(compared, "pissa", ["pissa"], "pissa", PLAIN)),
    "loraplus": (
        "LoRA+ (ratio 16) is better than LoRA",
        partial(compared, "loraplus", ["loraplus"], "loraplus", PLAIN),
    ),
    "rslora": (
        "rsLoRA is better than LoRA at a high rank (64)",
        partial(compared, "rslora", ["rslora"], "rslora", "r64"),
    ),
    "rewards": (
        "Rank 1 is enough for reinforcement learning: r = 16 and full fine-tuning are not better",
        rank_1_for_rewards,
    ),
    "batch": ("A large batch hurts LoRA more than full fine-tuning", batch),
    "forgetting": ("LoRA forgets less than full fine-tuning", forgetting),
    "intruders": ("LoRA makes intruder dimensions that full fine-tuning does not make", intruders),
}


def findings(results: Mapping[str, Mapping[str, Result]]) -> list[Finding]:
    """results: setting -> study -> result."""
    return [
        found
        for _, find in STATEMENTS.values()
        for setting, of_setting in results.items()
        for found in find(setting, of_setting)
    ]
