"""What training changed on held-out examples, with intervals and in words."""

import math

from numpy.typing import ArrayLike

from tailora.evaluation.intervals import Interval, mean_interval, paired_difference


def changes(before: ArrayLike, after: ArrayLike, counts: ArrayLike) -> dict[str, Interval]:
    """Loss in nats per token before, after, and the change, each with a 95% interval over examples.

    before, after: nats of each example; counts: its tokens; all (examples,).
    """
    return {
        "before": mean_interval(before, counts),
        "after": mean_interval(after, counts),
        "change": paired_difference(before, after, counts),
    }


def verdict(change: Interval, examples: int) -> str:
    """The change in words; an interval that holds 0 shows none."""
    value, low, high = change
    if math.isnan(low):
        return f"Loss changed by {value:+.3f} on the only held-out example: too little to tell whether it worked."
    where = f"over {examples} held-out examples"
    if low <= 0 <= high:
        return f"No change shown: {value:+.3f} nats per token (95% interval {low:+.3f} to {high:+.3f}, {where})."
    direction, small, large = ("down", -high, -low) if value < 0 else ("UP", low, high)
    interval = f"95% interval {small:.3f} to {large:.3f}"
    return f"Held-out loss went {direction} by {abs(value):.3f} nats per token ({interval}, {where})."
