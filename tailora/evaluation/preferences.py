"""What a run on preferences has changed: accuracy, margin and log-probabilities of held-out replies.

A reply's reward is what `train.preference` says: beta times its log-probability relative to that before training, or
per token for losses without a reference. Before training, rewards of the first kind are all 0.

    likelier   share of pairs whose chosen reply has the larger log-probability: `tailora eval` calls it accuracy
    accuracy   share of pairs whose chosen reply has the larger reward; of single replies, share of the right sign.
               Equal rewards, and rewards of 0, count as half.
    margin     mean reward of chosen (or wanted) replies minus that of rejected (unwanted) ones
    chosen, rejected   mean log-probability of these replies in nats. Both may fall while the margin rises.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tailora.evaluation.statistics import Interval, mean_interval, wilson_interval

LOG_PROBABILITIES = ("chosen", "rejected")
Scores = Sequence[Mapping[str, float]]  # of each example, by `score_names` of its task


def preference_metrics(scores: Scores) -> dict[str, Interval]:
    """Returns the metrics with intervals over examples; of one kind of replies only what they allow.

    Intervals of shares are Wilson's, the others bootstrapped.
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
    """Returns the change in words."""
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
        text += f". The log-probability of chosen replies {chosen}, that of rejected ones {rejected}"
    return f"{text}."


def _accuracy(margins: NDArray[np.float64]) -> Interval:
    """Returns the share of positive margins, with Wilson's interval unless there are ties, which count as half."""
    shares = (np.sign(margins) + 1) / 2
    return _mean(shares) if (margins == 0).any() else wilson_interval(shares)


def _mean(values: NDArray[np.float64]) -> Interval:
    return mean_interval(values, np.ones(len(values)))
