"""Whether held-out rewards rose, whether the metrics rose with them, and pass@k."""

import numpy as np
import pytest

from tailora.evaluation.rewards import RewardsByName, describe_rewards, reward_changes, scores_of

PROMPTS, COMPLETIONS = 100, 8


def judged(
    before: float, after: float, *, judge: tuple[float, float] = (0.3, 0.3), prompts: int = PROMPTS
) -> tuple[RewardsByName, RewardsByName]:
    """Returns scores of a graded reward with these means, and of a judge with these shares of ones."""
    random = np.random.default_rng(0)
    difficulty = random.normal(0, 0.1, (prompts, 1))
    sides = []
    for mean, share in zip((before, after), judge, strict=True):
        reward = np.clip(mean + difficulty + random.normal(0, 0.2, (prompts, COMPLETIONS)), 0, 1)
        shares = share if share in (0, 1) else share + difficulty
        sides.append({"reward": reward, "answer": (random.random(reward.shape) < shares).astype(float)})
    return sides[0], sides[1]


def verdict(before: RewardsByName, after: RewardsByName) -> str:
    return describe_rewards(reward_changes(before, after), ["score"], ["answer"], "N prompts")


@pytest.mark.parametrize("shares", [(0.3, 0.3), (0.0, 0.0)])
def test_a_judge_that_does_not_rise_shows_a_reward_that_may_be_gamed(shares: tuple[float, float]) -> None:
    text = verdict(*judged(0.2, 0.8, judge=shares))
    assert text.startswith("The reward may be gamed (score): these metrics did not rise with it: answer")
    assert "The held-out reward rose by 0.5" in text


@pytest.mark.parametrize("shares", [(0.2, 0.35), (0.0, 0.5)])
def test_a_judge_that_rises_even_by_less_does_not(shares: tuple[float, float]) -> None:
    text = verdict(*judged(0.2, 0.8, judge=shares))
    assert "These metrics rose with it: answer 0." in text
    assert "gamed" not in text


@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.12, 1.12)])
def test_a_judge_at_its_highest_value_shows_nothing(shares: tuple[float, float]) -> None:
    assert "were at their highest value before training" in verdict(*judged(0.2, 0.8, judge=shares))


def test_a_constant_judge_shows_nothing() -> None:
    before, after = judged(0.2, 0.8)
    sides = [{**scores, "answer": np.full((PROMPTS, COMPLETIONS), 0.5)} for scores in (before, after)]
    assert "were at their highest value before training" in verdict(*sides)


@pytest.mark.parametrize(
    ("shares", "prompts", "skipped"),
    [((0.3, 0.3), 100, 95), ((0.3, 0.9), 100, 95), ((0.25, 0.33), 12, 0), ((0.9, 0.91), 20, 0)],
)
def test_what_cannot_be_told_is_called_undecided(shares: tuple[float, float], prompts: int, skipped: int) -> None:
    sides = judged(0.2, 0.8, judge=shares, prompts=prompts)
    for scores in sides:
        scores["answer"][:skipped] = np.nan
    text = verdict(*sides)
    assert "Undecided whether these rose with it: answer 0." in text
    assert "gamed" not in text


def test_prompts_that_a_judge_leaves_out_are_left_out() -> None:
    before, after = judged(0.2, 0.8, judge=(0.2, 0.6))
    whole = reward_changes(before, after)["answer"]
    before["answer"][:10], after["answer"][10:12] = np.nan, np.nan
    before["answer"][20, 1:] = np.nan
    changes = reward_changes(before, after)
    found = changes["answer"]
    assert (len(whole.change.sums), len(found.change.sums)) == (PROMPTS, PROMPTS - 12)
    known = ~np.isnan(before["answer"] + after["answer"])
    assert found.after.value == pytest.approx(after["answer"][known].mean())
    assert found.change.interval.value == pytest.approx(found.after.value - found.before.value)
    assert found.change.missing == (~known).mean() > 0.05
    assert len(changes[f"pass@{COMPLETIONS}/answer"].change.sums) == PROMPTS - 13  # one more has too few scores
    assert "Undecided whether" in describe_rewards(changes, ["score"], ["answer"], "N prompts")
    for scores in (sides := judged(0.2, 0.8)):
        for part in scores.values():
            part[:10] = np.nan  # a function may skip prompts, but the sum of all has no score for them
    changes = reward_changes(*sides)
    assert (changes["answer"].change.missing, changes["reward"].change.missing) == (0, 0.1)
    before["answer"][:] = np.nan
    assert "answer" not in reward_changes(before, after)
    assert "Without a --metric" in describe_rewards(reward_changes(before, after), ["score"], ["answer"], "N prompts")


@pytest.mark.parametrize(
    ("prompts", "unscored", "words"), [(5, 0, "too little data"), (20, 9, "6% of the completions")]
)
def test_few_prompts_and_missing_scores_decide_nothing(prompts: int, unscored: int, words: str) -> None:
    sides = judged(0.2, 0.8, prompts=prompts)
    sides[0]["reward"].flat[:unscored] = np.nan
    assert words in verdict(*sides)
    sides[0]["reward"].flat[:8] = 0.0
    assert ("The held-out reward rose" in verdict(*sides)) == (prompts == 20)
    sides[0]["reward"][:] = np.nan
    assert "no completion has a score before and after" in verdict(*sides)


def test_judges_that_disagree_are_all_named() -> None:
    before, after = judged(0.2, 0.8, judge=(0.3, 0.3))
    for scores, share in ((before, 0.1), (after, 0.9)):
        scores["other"] = (np.arange(COMPLETIONS) < share * COMPLETIONS) * np.ones((PROMPTS, 1))
    text = describe_rewards(reward_changes(before, after), ["score"], ["answer", "other"], "N prompts")
    assert "did not rise with it: answer" in text
    assert "rose with it: other" in text


@pytest.mark.parametrize(
    ("after", "words"), [(0.2, "No change of the held-out reward shown"), (0.05, "reward fell by")]
)
def test_a_reward_that_does_not_rise_is_never_called_gamed(after: float, words: str) -> None:
    assert words in verdict(*judged(0.2, after, judge=(0.3, 0.1)))


def test_numbers_that_are_not_rewards() -> None:
    sides = [
        {
            **scores,
            "completion_tokens": scores["answer"] * 0 + 5,
            "truncated": scores["answer"],
            "kl": scores["answer"],
        }
        for scores in judged(0.2, 0.8)
    ]
    changes = reward_changes(*sides)
    assert changes["completion_tokens"].after.value == 5
    assert {name for name in changes if "@" in name} == {"pass@8/answer"}


def test_scores_that_are_not_known_are_read_as_such() -> None:
    rows = [{"scores_after": {"reward": [0.5, None]}}, {"scores_after": {"reward": [1.0, 2.0]}}]
    np.testing.assert_array_equal(scores_of(rows, "after")["reward"], [[0.5, np.nan], [1.0, 2.0]])
