"""Whether reinforcement learning worked: rewards of held-out prompts before and after, and whether they may be gamed.

A reward is gamed if the model finds completions that score high without being better. Rewards that only judge
(--eval-reward) are not trained on, so a model that improves raises them too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tailora.evaluation.statistics import Interval, mean_interval, paired_difference

Floats = npt.NDArray[np.float64]
SHARE_OF_RISE = 0.25  # a judge that rises by less than this share of the reward's rise, in standard deviations, did not
MEANINGS = {
    "reward": "weighted sum of the rewards that were trained on, mean over the completions of each prompt",
    "best": "the best reward among the completions of each prompt",
    "completion_tokens": "mean length of a completion",
    "truncated": "share of completions that reached --max-completion-length without an end",
}


@dataclass(frozen=True)
class RewardChange:
    """A number of each held-out prompt, before and after training, and its change; with 95% intervals."""

    before: Interval
    after: Interval
    change: Interval
    std: float  # of the prompts before training

    @property
    def standardized(self) -> tuple[float, float, float]:
        """The change and the ends of its interval in standard deviations."""
        value, low, high = (float(number) / max(self.std, 1e-8) for number in self.change)
        return value, low, high


def reward_changes(
    before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]
) -> dict[str, RewardChange]:
    """Returns name -> its change. before, after: the scores of each held-out prompt by name."""
    changes = {}
    for name in before[0]:
        first, second = (np.array([row[name] for row in rows], dtype=np.float64) for rows in (before, after))
        known = ~(np.isnan(first) | np.isnan(second))
        if not known.any():
            continue
        first, second, counts = first[known], second[known], np.ones(int(known.sum()))
        changes[name] = RewardChange(
            mean_interval(first, counts),
            mean_interval(second, counts),
            paired_difference(first, second, counts),
            float(np.concatenate([first, second]).std()),
        )
    return changes


def gamed_by(changes: Mapping[str, RewardChange], judges: Sequence[str]) -> list[str]:
    """Returns the judges that did not rise with the reward; [] unless the reward rose."""
    reward = changes["reward"]
    if not reward.change.low > 0:
        return []
    rise = reward.standardized[0]
    return [name for name in judges if name in changes and changes[name].standardized[2] < SHARE_OF_RISE * rise]


def describe_rewards(changes: Mapping[str, RewardChange], judges: Sequence[str], prompts: str) -> str:
    """Returns the verdict. prompts: "20 held-out prompts"."""
    reward = changes["reward"].change
    if np.isnan(reward.low):
        return f"The held-out reward changed by {reward.value:+.3f} over {prompts}: too little data to tell."
    ends = f"95% interval {reward.low:+.3f} to {reward.high:+.3f}, over {prompts}"
    if reward.low <= 0 <= reward.high:
        return f"No change of the held-out reward shown: {reward.value:+.3f} ({ends})."
    if reward.value < 0:
        return f"The held-out reward fell by {-reward.value:.3f} ({ends})."
    rose = f"The held-out reward rose by {reward.value:.3f} ({ends})."
    known = [name for name in judges if name in changes]
    if not known:
        return f"{rose} No reward only judges, so a gamed reward would not show; add one with --eval-reward."
    gamed = gamed_by(changes, known)
    shown = ", ".join(_change_of(name, changes[name]) for name in gamed or known)
    if gamed:
        return f"Only the training reward rose, so it may be gamed: {shown}. {rose}"
    uncertain = [name for name in known if changes[name].change.low <= 0]
    if uncertain:
        return f"{rose} Whether {' and '.join(uncertain)} rose with it cannot be told: {shown}."
    return f"{rose} The rewards that only judge rose with it: {shown}."


def _change_of(name: str, change: RewardChange) -> str:
    low, high = change.change.low, change.change.high
    return f"{name} {change.before.value:.3f} to {change.after.value:.3f} (change {low:+.3f} to {high:+.3f})"


def scores_of(rows: Sequence[Mapping[str, Any]], when: str) -> list[dict[str, float]]:
    """Returns the scores of examples.jsonl. when: before or after."""
    return [{name: np.nan if value is None else value for name, value in row[f"scores_{when}"].items()} for row in rows]
