"""Whether reinforcement learning worked: rewards of held-out prompts before and after, and whether they may be gamed.

A reward is gamed if the model finds completions that score high without being better. Metrics
(--metric) are not trained on, so a model that improves raises them too. A metric

    rose           if its change is "better" (train/significance.py)
    did not rise   if its change is "worse", or its interval ends below SHARE_OF_RISE of the reward's own rise
    cannot rise    if it was near its highest value before training
    is undecided   otherwise: the interval is too wide, or too few prompts were scored

Rises are compared in standard deviations, and as shares of what was left up to the highest value. A metric did not rise
only if both agree: standard deviations mean little near the highest value, shares little if values are unbounded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailora.evaluation.statistics import mean_interval, wilson_interval
from tailora.train.significance import MOST_MISSING, Change, Floats, Interval, change_of

RewardsByName = Mapping[str, Floats]  # name -> (prompts, completions of each), NaN: not scored
SHARE_OF_RISE = 0.25  # a metric that rises by less than this share of the reward's rise did not rise
NEAR_HIGHEST = 0.05  # share of the range of a metric's values; closer to its highest, it cannot rise
NO_REWARDS = ("completion_tokens", "truncated", "over_limit", "kl")
MEANINGS = {
    "reward": "weighted sum of the rewards that were trained on, mean over the completions of each prompt",
    "pass@k": "probability that at least one of k completions scores 1 (unbiased estimate)",
    "completion_tokens": "mean length of a completion",
    "truncated": "share of completions that reached --max-completion-length without an end",
    "over_limit": "share of completions that a built-in reward gave 0, or a function did not score: no result in time",
    "kl": "KL(tuned || base) in nats per token, estimated on these completions",
}
NOTHING_TRAINED = (
    "Nothing was trained: in every step, all completions of each prompt had the same reward. Use a reward that tells "
    "better completions from worse ones, or other prompts."
)
FINDINGS = {  # the sentence for the metrics with each finding
    "did not rise": "The reward may be gamed ({gamed}): these metrics did not rise with it: {metrics}.",
    "rose": "These metrics rose with it: {metrics}.",
    "cannot rise": "These were at their highest value before training, so they cannot confirm it: {metrics}.",
    "undecided": "Undecided whether these rose with it: {metrics}. Hold out more prompts.",
}


@dataclass(frozen=True)
class RewardChange:
    """A score of the held-out completions, before and after training, and its change, with 95% intervals."""

    before: Interval
    after: Interval
    change: Change
    std: float  # over the prompts, before and after
    lowest: float  # score of a completion; 0 if all scores are 0 or 1
    highest: float


def reward_changes(before: RewardsByName, after: RewardsByName) -> dict[str, RewardChange]:
    """Returns name -> its change: of all scores, and of pass@k for those that are 0 or 1."""
    changes: dict[str, RewardChange | None] = {}
    for name in before:
        pair = before[name], after[name]
        if name == "over_limit" and not np.any(pair):
            continue
        if name != "reward":  # a function returns None for the prompts that it skips
            scored = ~np.isnan(pair).all((0, 2))
            pair = pair[0][scored], pair[1][scored]
        changes[name] = _change(*pair)
        if name not in ("reward", *NO_REWARDS) and _is_pass_or_fail(*pair):
            k = pair[0].shape[1]  # pass@1 is the mean
            changes[f"pass@{k}/{name}"] = _change(*(pass_at_k(part, k)[:, None] for part in pair))
    return {name: change for name, change in changes.items() if change is not None}


def _change(before: Floats, after: Floats) -> RewardChange | None:
    """Compares the completions that have both scores; None if there are none. before, after: (prompts, completions)."""
    known = ~np.isnan(before + after)
    prompts = known.any(1)
    if not prompts.any():
        return None
    counts, sums = known[prompts].sum(1), [np.where(known, part, 0)[prompts].sum(1) for part in (before, after)]
    means = [part / counts for part in sums]  # of each prompt
    if len(counts) > 1 and _is_pass_or_fail(*means):
        old, new = map(wilson_interval, means)
    else:
        old, new = (mean_interval(part, counts) for part in sums)
    values = [0.0, 1.0] if _is_pass_or_fail(before, after) else [before, after]
    change = change_of(sums[0], sums[1], counts, missing=int((~known).sum()))
    std = float(np.concatenate(means).std())
    return RewardChange(old, new, change, std, float(np.nanmin(values)), float(np.nanmax(values)))


def _is_pass_or_fail(*scores: Floats) -> bool:
    """True if all known scores are 0 or 1."""
    return all(bool((np.isnan(part) | np.isin(part, (0, 1))).all()) for part in scores)


def pass_at_k(scores: Floats, k: int) -> Floats:
    """Returns the probability that at least one of k completions is right, for each prompt.

    The estimate is unbiased (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    scores: (prompts, completions), 1 if right, 0 if wrong, NaN if not scored. NaN where fewer than k are scored.
    """
    pairs = [(int((~np.isnan(row)).sum()), int(np.nansum(row))) for row in scores]
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) if n >= k else np.nan for n, c in pairs])


# ---- The verdict


def find(metric: RewardChange, reward: RewardChange) -> str:
    """Returns whether a metric rose with the reward, which rose: a key of FINDINGS."""
    most, limit = metric.change.interval.high, SHARE_OF_RISE * reward.change.interval.value
    room = metric.highest - metric.before.value
    if metric.change.finding != "cannot tell":
        return "rose" if metric.change.finding == "better" else "did not rise"
    if metric.change.is_too_few or metric.change.missing > MOST_MISSING:
        return "undecided"
    if room <= NEAR_HIGHEST * (metric.highest - metric.lowest):
        return "cannot rise"
    is_small_share = most / room < limit / (reward.highest - reward.before.value)
    is_small_in_stds = not metric.std or most / metric.std < limit / reward.std
    return "did not rise" if is_small_share and is_small_in_stds else "undecided"


def describe_rewards(
    changes: Mapping[str, RewardChange], trained: Sequence[str], metrics: Sequence[str], prompts: str
) -> str:
    """Returns the verdict.

    trained, metrics: names of rewards.
    prompts: number and name, such as "20 held-out prompts".
    """
    if "reward" not in changes:
        return "Cannot tell whether the held-out reward changed: no completion has a score before and after training."
    reward = changes["reward"].change
    value, ends = reward.interval.value, f"{reward.numbers}, over {prompts}"
    if reward.is_too_few:
        return f"The held-out reward changed by {value:+.3f} over {prompts}: too little data to tell."
    if reward.missing > MOST_MISSING:
        left_out = f"{reward.missing:.0%} of the completions have no score before or after training"
        return f"Cannot tell whether the held-out reward changed: {left_out}. It changed by {value:+.3f} ({ends})."
    if reward.finding == "cannot tell":
        return f"No change of the held-out reward shown: {value:+.3f} ({ends})."
    if reward.finding == "worse":
        return f"The held-out reward fell by {-value:.3f} ({ends})."
    rose = f"The held-out reward rose by {value:.3f} ({ends})."
    shown: dict[str, list[str]] = {finding: [] for finding in FINDINGS}
    for name in metrics:
        if (change := changes.get(name)) is not None:
            _, low, high = change.change.interval
            numbers = f"{change.before.value:.3f} to {change.after.value:.3f} (change {low:+.3f} to {high:+.3f})"
            shown[find(change, changes["reward"])].append(f"{name} {numbers}")
    if not any(shown.values()):
        return f"{rose} Without a --metric, a gamed reward cannot be detected."
    gamed = [name for name in trained if name in changes and changes[name].change.finding == "better"] or trained
    texts = [text.format(gamed=" and ".join(gamed), metrics=", ".join(shown[key])) for key, text in FINDINGS.items()]
    said = [text for text, named in zip(texts, shown.values(), strict=True) if named]
    return " ".join([*said[:1], rose, *said[1:]] if shown["did not rise"] else [rose, *said])


def scores_of(rows: Sequence[Mapping[str, Any]], when: str) -> RewardsByName:
    """Returns the scores of examples.jsonl. when: before or after."""
    names = rows[0][f"scores_{when}"]
    return {name: np.array([row[f"scores_{when}"][name] for row in rows], dtype=np.float64) for name in names}
