"""Whether reinforcement learning worked: rewards of held-out prompts before and after, and whether they may be gamed.

A reward is gamed if the model finds completions that score high without being better. Rewards that only judge
(--eval-reward) are not trained on, so a model that improves raises them too. A judge

    rose           if the interval of its change is above 0
    did not rise   if that interval ends below 0, or below SHARE_OF_RISE of the reward's own rise
    cannot rise    if it was at its highest value before training
    is undecided   otherwise: the interval is too wide, or too few prompts were judged

Rises are compared in standard deviations, and as shares of what was left up to the highest value. A judge did not rise
only if both say so: standard deviations mean little near the highest value, and shares little if values are unbounded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tailora.evaluation.statistics import (
    Interval,
    mean_interval,
    paired_difference,
    share_difference,
    wilson_interval,
)
from tailora.train.grpo import group_means

Floats = npt.NDArray[np.float64]
Scores = Mapping[str, Floats]  # name -> (prompts, completions of each), NaN: not scored
Finding = Literal["rose", "did not rise", "cannot rise", "undecided"]
SHARE_OF_RISE = 0.25  # a judge that rises by less than this share of the reward's rise did not rise
NEAR_HIGHEST = 0.05  # share of the range of a judge's values; closer to its highest, it cannot rise
FEWEST_JUDGED = 8  # prompts; bootstrap intervals of fewer are too narrow to call a reward gamed
KL, TOKENS, TRUNCATED = "kl", "completion_tokens", "truncated"  # scores that are not rewards
MEANINGS = {
    "reward": "weighted sum of the rewards that were trained on, mean over the completions of each prompt",
    "pass@k": "probability that at least one of k completions scores 1 (unbiased estimate)",
    "best": "the best reward among the completions of each prompt",
    TOKENS: "mean length of a completion",
    TRUNCATED: "share of completions that reached --max-completion-length without an end",
    KL: "KL(tuned || base) in nats per token, estimated on these completions",
}


@dataclass(frozen=True)
class RewardChange:
    """A number of each held-out prompt, before and after training, and its change; with 95% intervals.

    std: over the prompts, before and after.    lowest, highest: of the completions; of what is 0 or 1, these.
    """

    before: Interval
    after: Interval
    change: Interval
    prompts: int
    std: float
    lowest: float
    highest: float

    @property
    def room(self) -> float:
        """How much it could rise."""
        return self.highest - self.before.value


def reward_changes(before: Scores, after: Scores) -> dict[str, RewardChange]:
    """Returns name -> its change: of all scores, and of pass@k for those that are 0 or 1."""
    changes: dict[str, RewardChange | None] = {}
    completions = before["reward"].shape[1]
    for name in before:
        pair = before[name], after[name]
        if name == KL:
            per_token = [
                scores[KL].sum(1, keepdims=True) / scores[TOKENS].sum(1, keepdims=True) for scores in (before, after)
            ]
            changes[name] = _change(*per_token)
            continue
        changes[name] = _change(*pair)
        if name == "reward":
            changes["best"] = _change(*(_best(part) for part in pair))
        elif name not in (TOKENS, TRUNCATED) and is_pass_or_fail(*pair):
            for k in (1, completions):
                changes[f"pass@{k}/{name}"] = _change(*(pass_at_k(part, k)[:, None] for part in pair))
    return {name: change for name, change in changes.items() if change is not None}


def _change(before: Floats, after: Floats) -> RewardChange | None:
    """Compares the means of the same prompts; None if no prompt has both.    before, after: (prompts, completions)."""
    first, second = group_means(before), group_means(after)
    known = ~(np.isnan(first) | np.isnan(second))
    if not known.any():
        return None
    first, second, counts = first[known], second[known], np.ones(int(known.sum()))
    if len(first) > 1 and is_pass_or_fail(first, second):
        intervals = wilson_interval(first), wilson_interval(second), share_difference(first, second)
    else:
        ends = mean_interval(first, counts), mean_interval(second, counts)
        intervals = (*ends, paired_difference(first, second, counts))
    values = [0.0, 1.0] if is_pass_or_fail(before, after) else [before, after]
    std = float(np.concatenate([first, second]).std())
    return RewardChange(*intervals, len(first), std, float(np.nanmin(values)), float(np.nanmax(values)))


def _best(scores: Floats) -> Floats:
    """Returns the best score of each prompt, (prompts, 1); NaN if none of its completions is scored."""
    best = np.where(np.isnan(scores), -np.inf, scores).max(1, keepdims=True)
    known: Floats = np.where(np.isinf(best), np.nan, best)
    return known


def is_pass_or_fail(*scores: Floats) -> bool:
    """True if all known scores are 0 or 1."""
    return all(bool((np.isnan(part) | np.isin(part, (0, 1))).all()) for part in scores)


def pass_at_k(scores: Floats, k: int) -> Floats:
    """Returns the probability that at least one of k completions is right, for each prompt.

    The estimate is unbiased (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    scores: (prompts, completions), 1 if right, 0 if wrong, NaN if not scored. NaN where fewer than k are scored.
    """
    known = (~np.isnan(scores)).sum(1).tolist()
    right = np.nansum(scores, axis=1).astype(int).tolist()
    pairs = zip(known, right, strict=True)
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) if n >= k else np.nan for n, c in pairs])


# ---- The verdict


def find(judge: RewardChange, reward: RewardChange) -> Finding:
    """Returns whether a judge rose with the reward, which rose."""
    if judge.prompts < FEWEST_JUDGED:
        return "undecided"
    if judge.change.low > 0:
        return "rose"
    if judge.change.high < 0:
        return "did not rise"
    if judge.room <= NEAR_HIGHEST * (judge.highest - judge.lowest):
        return "cannot rise"
    limit, most = SHARE_OF_RISE * reward.change.value, judge.change.high
    is_small_share = most / judge.room < limit / reward.room
    is_small_in_stds = not judge.std or most / judge.std < limit / reward.std
    return "did not rise" if is_small_share and is_small_in_stds else "undecided"


def gamed_by(changes: Mapping[str, RewardChange], judges: Sequence[str]) -> list[str]:
    """Returns the judges that did not rise with the reward; [] unless the reward rose."""
    reward = changes["reward"]
    if not reward.change.low > 0:
        return []
    return [name for name in judges if name in changes and find(changes[name], reward) == "did not rise"]


def describe_rewards(
    changes: Mapping[str, RewardChange], trained: Sequence[str], judges: Sequence[str], prompts: str
) -> str:
    """Returns the verdict. trained, judges: names of rewards.    prompts: "20 held-out prompts"."""
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
    names: dict[Finding, list[str]] = {}
    for name in known:
        names.setdefault(find(changes[name], changes["reward"]), []).append(name)

    def shown(finding: Finding) -> str:
        return ", ".join(_change_of(name, changes[name]) for name in names[finding])

    sentences = [rose]
    if "did not rise" in names:
        gamed = [name for name in trained if name in changes and changes[name].change.low > 0] or list(trained)
        only = "only the training reward rose" if len(names) == 1 else "not all judging rewards rose with it"
        lead = f"{' and '.join(gamed)} may be gamed, because {only}. These did not rise: {shown('did not rise')}."
        sentences = [lead, rose]
    if "rose" in names:
        sentences.append(f"Of the rewards that only judge, these rose with it: {shown('rose')}.")
    if "cannot rise" in names:
        sentences.append(
            f"These had their highest value before training, so they show nothing: {shown('cannot rise')}."
        )
    if "undecided" in names:
        sentences.append(f"Undecided whether these rose with it: {shown('undecided')}. Hold out more prompts.")
    return " ".join(sentences)


def _change_of(name: str, change: RewardChange) -> str:
    low, high = change.change.low, change.change.high
    return f"{name} {change.before.value:.3f} to {change.after.value:.3f} (change {low:+.3f} to {high:+.3f})"


def scores_of(rows: Sequence[Mapping[str, Any]], when: str) -> Scores:
    """Returns the scores of examples.jsonl. when: before or after."""
    names = rows[0][f"scores_{when}"]
    return {name: np.array([row[f"scores_{when}"][name] for row in rows], dtype=np.float64) for name in names}
