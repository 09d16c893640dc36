"""Confidence intervals and tests for losses, shares of right answers, and differences between two models.

Losses are given as sums (nats of each example) and counts (tokens of it that are learned): a loss is sum / count.

    one run, a loss              mean_interval                               t interval over examples
    several seeds, a loss        interval_over_seeds, difference_over_seeds  crossed random effects
    a share of right answers     wilson_interval                             Wilson
    the change of either         train/significance.py; in words: describe_change
    a run on preferences         preference_metrics, describe_preferences
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from tailora.train.significance import (
    LEVEL,
    Change,
    Floats,
    Interval,
    Z,
    checked_hits,
    error_over_clusters,
    ratio_interval,
)

FEW_EXAMPLES = 20  # held-out examples; with fewer, an interval is unreliable
TOO_FEW = f"These are too few for a reliable result: hold out at least {FEW_EXAMPLES} examples."

# ---- One run
#
# Tokens of one conversation are alike, so conversations count, not tokens. For 10 to 200 simulated conversations of
# very unequal length, the t interval of the ratio contained the true loss in 88% to 92% of cases, a bootstrap over
# conversations in 80% to 91%.


def mean_interval(sums: ArrayLike, counts: ArrayLike) -> Interval:
    """Returns the loss per token with its 95% interval. sums: nats, counts: trained tokens; both (examples,)."""
    nats, tokens = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if nats.ndim != 1 or nats.shape != tokens.shape:
        raise ValueError(f"expected one number per example, got sums {nats.shape} and counts {tokens.shape}")
    if not tokens.any():
        raise ValueError("expected at least one example with tokens, got counts of 0")
    return ratio_interval(nats[tokens > 0], tokens[tokens > 0])


# ---- Several seeds: crossed random effects
#
# difference of seed j on example i = mean + effect of the example + effect of the seed + residual. More examples do not
# make up for few seeds, nor the other way round. Each of the two sources has a standard error with its own t quantile,
# and the squares of the two half-widths add up. A single quantile for both, with pooled degrees of freedom, is too
# small when two seeds happen to be alike: 89% to 95% of those intervals contain the truth, 95% to 99% of these
# (simulated).

SMALLEST_LOG_P = -600.0


def interval_over_seeds(sums: ArrayLike, counts: ArrayLike) -> Interval:
    """Returns the loss per token, over examples and seeds. sums: nats (seeds, examples); counts: tokens (examples,)."""
    nats, tokens = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    nats, tokens = nats[:, tokens > 0], tokens[tokens > 0]
    value = float(nats.sum() / (len(nats) * tokens.sum()))
    half = math.hypot(*(t_quantile(LEVEL, degrees) * error for error, degrees in _standard_errors(nats, tokens, value)))
    return Interval(value, value - half, value + half)


@dataclass(frozen=True)
class Difference:
    """The difference of two losses, second - first, with its interval and test."""

    value: float
    low: float
    high: float
    p_value: float  # two-sided, against no difference; below .05 exactly if the interval excludes 0
    examples: int
    seeds: int
    from_examples: float  # share of the squared half-width that more examples would reduce; more seeds reduce the rest
    comparisons: int = 1  # compared together: in 95% of cases, all of their intervals contain the truth


def difference_over_seeds(
    first: ArrayLike, second: ArrayLike, counts: ArrayLike, *, comparisons: int = 1
) -> Difference:
    """Compares two ways of training on the same examples and seeds.

    first, second: nats (seeds, examples); counts: tokens of each example, (examples,).
    comparisons: as in `Difference`; intervals and p-values are adjusted for their number (Bonferroni).
    With one seed the spread over seeds is unknown and ignored: the interval is then too narrow, and `seeds` is 1.
    Raises ValueError for shapes that do not match, fewer than two examples, or values that are not finite.
    """
    from scipy.optimize import brentq  # an optional package

    before, after, tokens = (np.asarray(values, dtype=np.float64) for values in (first, second, counts))
    if before.ndim != 2 or before.shape != after.shape or tokens.shape != before.shape[1:]:
        raise ValueError(
            f"expected (seeds, examples) twice and (examples,), got {before.shape}, {after.shape}, {tokens.shape}"
        )
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("a loss is not finite")
    differences, tokens = (after - before)[:, tokens > 0], tokens[tokens > 0]
    seeds, examples = differences.shape
    if examples < 2:
        raise ValueError("expected at least two examples with tokens")
    value = float(differences.sum() / (seeds * tokens.sum()))
    errors = _standard_errors(differences, tokens, value)

    def half_widths(level: float) -> list[float]:
        return [t_quantile(level, degrees) * error for error, degrees in errors]

    widths = half_widths(LEVEL / comparisons)
    half = math.hypot(*widths)
    share = (widths[0] / half) ** 2 if half else 0.5
    if half == 0 or math.hypot(*half_widths(math.exp(SMALLEST_LOG_P))) <= abs(value):
        p_value = float(value == 0)
    else:
        p_value = math.exp(brentq(lambda p: math.hypot(*half_widths(math.exp(p))) - abs(value), SMALLEST_LOG_P, 0))
    p_value = min(1.0, comparisons * p_value)
    return Difference(value, value - half, value + half, p_value, examples, seeds, share, comparisons)


def _standard_errors(differences: Floats, tokens: Floats, value: float) -> list[tuple[float, int]]:
    """Returns the standard errors that come from the examples and, with several seeds, from the seeds; each with its
    degrees of freedom.

    differences: in nats, (seeds, examples).
    value: difference per token.
    """
    seeds, examples = differences.shape
    residual = (differences - value * tokens) / tokens.mean()  # (seeds, examples): the ratio, linearized; mean 0
    by_seed = residual.mean(1)
    errors = [(error_over_clusters(differences.mean(0) - value * tokens, tokens), examples - 1)]
    if seeds > 1:
        errors.append((float(np.sqrt((by_seed**2).sum() / (seeds * (seeds - 1)))), seeds - 1))
    return errors


def t_quantile(level: float, degrees: int) -> float:
    """Returns the value that |t| exceeds with this probability."""
    from scipy.special import stdtrit

    return float(-stdtrit(degrees, level / 2))


def seeds_needed(difference: Difference, half_width: float, most: int) -> int | None:
    """Returns the number of seeds for an interval this narrow, if all of its width is due to the seeds.

    None for more than `most`.
    """

    def width(seeds: int) -> float:
        return t_quantile(LEVEL / difference.comparisons, seeds - 1) / sqrt(seeds)

    times = half_width / ((difference.high - difference.low) / 2)
    more = range(difference.seeds + 1, most + 1)
    return next((seeds for seeds in more if width(seeds) <= times * width(difference.seeds)), None)


# ---- Shares of right answers
#
# A bootstrap has no spread if all answers are right or all are wrong: at a true share of 2% its 95% interval contained
# the truth in 35% of samples of 20 and in 65% of samples of 50 (1,500 simulated), Wilson's interval in 94% and 93%.


def wilson_interval(hits: ArrayLike) -> Interval:
    """Returns the share of ones with its interval (Wilson, J. Am. Stat. Assoc. 22, 1927). hits: (examples,), 0 or 1.

    Raises ValueError if there are no examples or other values.
    """
    right = checked_hits(hits)
    n, share, z = len(right), float(right.mean()), Z
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


# ---- What training changed on held-out examples


def describe_change(change: Change, examples: str, unit: str) -> str:
    """Describes the change of a loss in a sentence.

    examples: number and name, such as "10 held-out examples".
    """
    value, low, high = change.interval
    where = f"over {examples}"
    if change.is_too_few:
        return f"Loss changed by {value:+.3f} {where}: too little data to tell whether it worked."
    if change.finding == "cannot tell":
        return f"No change shown: {value:+.3f} {unit} ({change.numbers}, {where})."
    direction, small, large = ("down", -high, -low) if value < 0 else ("UP", low, high)
    interval = f"95% interval {small:.3f} to {large:.3f}"
    return f"Held-out loss went {direction} by {abs(value):.3f} {unit} ({interval}, {where})."


# ---- The effect of preference training: accuracy, margin and log-probabilities of held-out replies
#
# A reply's reward is what `train.preference` defines: beta times its log-probability relative to that before training,
# or per token for losses without a reference. Before training, rewards of the first kind are all 0.
#
#     likelier   share of pairs whose chosen reply has the larger log-probability: `tailora eval` calls it accuracy
#     accuracy   share of pairs whose chosen reply has the larger reward; of single replies, share of the right sign.
#                Equal rewards, and rewards of 0, count as half.
#     margin     mean reward of chosen (or wanted) replies minus the mean of rejected (unwanted) ones
#     chosen, rejected   mean log-probability of these replies in nats. Both may fall while the margin rises.

LOG_PROBABILITIES = ("chosen", "rejected")


def preference_metrics(scores: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    """Returns the metrics with intervals over examples; with one kind of replies, only those that are defined.

    scores: of each example, by `score_names` of its task.

    Intervals of shares are Wilson's, the others t intervals.
    """
    columns = {name: np.array([row[name] for row in scores]) for name in scores[0]}
    if "desirable" not in columns:
        margin = columns["chosen_reward"] - columns["rejected_reward"]
        return {
            "accuracy": _accuracy(margin),
            "margin": _mean(margin),
            "likelier": _accuracy(columns["chosen"] - columns["rejected"]),
            **{name: _mean(columns[name]) for name in LOG_PROBABILITIES},
        }
    wanted = columns["desirable"] > 0
    metrics = {"accuracy": _accuracy(np.where(wanted, 1, -1) * columns["reward"])}
    if 0 < wanted.sum() < len(wanted):
        # the mean of these is the difference of the two means
        weights = np.where(wanted, 1 / wanted.mean(), -1 / (~wanted).mean())
        metrics["margin"] = _mean(weights * columns["reward"])
    for name, part in zip(LOG_PROBABILITIES, (wanted, ~wanted), strict=True):
        if part.any():
            metrics[name] = _mean(columns["reply"][part])
    return metrics


def describe_preferences(before: Mapping[str, Interval], after: Mapping[str, Interval]) -> str:
    accuracy = after["accuracy"]
    share, are_pairs = f"{accuracy.value:.0%}", "likelier" in after
    text = f"Rewards put {share} of the pairs in the right order"
    if not are_pairs:
        text = f"{share} of the rewards have the right sign"
    if not np.isnan(accuracy.low):
        text += f" (95% interval {accuracy.low:.0%} to {accuracy.high:.0%}; before {before['accuracy'].value:.0%})"
    changes = [after[name].value - before[name].value for name in LOG_PROBABILITIES if name in after]
    if len(changes) == 2:
        chosen, rejected = (f"{'fell' if change < 0 else 'rose'} by {abs(change):.1f} nats" for change in changes)
        text += f". The log-probability {chosen} for chosen replies and {rejected} for rejected ones"
    return f"{text}."


def _accuracy(margins: Floats) -> Interval:
    """Returns the share of positive margins, with Wilson's interval unless there are ties, which count as half."""
    shares = (np.sign(margins) + 1) / 2
    return _mean(shares) if (margins == 0).any() else wilson_interval(shares)


def _mean(values: Floats) -> Interval:
    return mean_interval(values, np.ones(len(values)))
