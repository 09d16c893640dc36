"""How often a run's verdict and its exit code are wrong: simulated rewards of held-out prompts.

    python -m benchmarks.studies.verdicts          10,000 runs per case; writes results/verdicts.json
    python -m benchmarks.studies.verdicts --quick  100 runs per case; writes nothing

Without a change, both models draw their completions from one distribution: exit code 5 is wrong, and so is a sentence
that says that the reward rose or fell. With a change, the share of runs that find it is the power. The sentence and the
exit code of each run come from the functions that `tailora train` calls.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from tailora.evaluation.rewards import describe_rewards, reward_changes
from tailora.train.significance import Interval

RESULT = Path(__file__).parents[1] / "results" / "verdicts.json"
PROMPTS = (2, 3, 5, 6, 8, 12, 20, 50, 100, 200)
Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, Floats, float], Floats]  # difficulty of each prompt (prompts, 1), shift -> scores


def _right(completions: int, mean: float) -> Draw:
    """Scores of 0 or 1, of prompts with different chances of a right completion."""

    def draw(random: np.random.Generator, difficulty: Floats, shift: float) -> Floats:
        chance = np.clip(mean + shift + 0.15 * difficulty, 0, 1)
        return (random.random((len(difficulty), completions)) < chance).astype(np.float64)

    return draw


def _continuous(noise: Callable[[np.random.Generator, tuple[int, int]], Floats], unscored: float = 0.0) -> Draw:
    """Scores of 8 completions. unscored: share of None."""

    def draw(random: np.random.Generator, difficulty: Floats, shift: float) -> Floats:
        shape = (len(difficulty), 8)
        scores = difficulty + shift + noise(random, shape)
        return np.where(random.random(shape) < unscored, np.nan, scores)

    return draw


CASES: dict[str, Draw] = {
    "0/1, one completion": _right(1, 0.5),
    "0/1, one completion, rarely right": _right(1, 0.05),
    "0/1, 8 completions": _right(8, 0.5),
    "normal, 8 completions": _continuous(lambda random, shape: random.normal(size=shape)),
    "lognormal, 8 completions": _continuous(lambda random, shape: random.lognormal(0, 1, shape)),
    "normal, 8 completions, 2% without a score": _continuous(lambda random, shape: random.normal(size=shape), 0.02),
}
CHANGES = {("0/1, one completion", 200): 0.2, ("normal, 8 completions", 20): 0.5}  # of the mean score: 40% to 60%


def simulate(draw: Draw, prompts: int, runs: int, *, shift: float = 0.0, seed: int = 0) -> dict[str, float]:
    """Returns shares of the runs. shift: how much higher the scores are after training; half of it before."""
    random, seen = np.random.default_rng(seed), dict.fromkeys(("exit code 5", "rose", "cannot tell", "disagree"), 0)
    # the intervals of the mean before and after decide nothing, and take most of the time
    fixed = {name: lambda *_: Interval(0.0, 0.0, 0.0) for name in ("mean_interval", "wilson_interval")}
    with patch.multiple("tailora.evaluation.rewards", **fixed):
        for _ in range(runs):
            difficulty = random.normal(size=(prompts, 1))
            sides = [draw(random, difficulty, side * shift) for side in (-0.5, 0.5)]
            if np.isnan(sides[0] + sides[1]).all():
                continue
            changes = reward_changes(*({"reward": side} for side in sides))
            worse = changes["reward"].change.finding == "worse"  # what the exit code follows
            text = describe_rewards(changes, ["f"], [], "N prompts")
            seen["exit code 5"] += worse
            seen["rose"] += "reward rose by" in text
            seen["cannot tell"] += any(words in text for words in ("too little data", "No change", "Cannot tell"))
            seen["disagree"] += worse != ("reward fell by" in text)
    return {name: count / runs for name, count in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    runs = 100 if quick else 10_000
    content: dict[str, Mapping[str, Any]] = {"without a change": {}, "with a change": {}}
    for name, draw in CASES.items():
        for prompts in PROMPTS:
            shares = simulate(draw, prompts, runs)
            content["without a change"] |= {f"{name}, {prompts} prompts": shares}  # type: ignore[operator]
            print(name, prompts, shares, flush=True)
    for (name, prompts), shift in CHANGES.items():
        shares = simulate(CASES[name], prompts, runs, shift=shift)
        content["with a change"] |= {f"{name}, {prompts} prompts, {shift:+g}": shares}  # type: ignore[operator]
        print(name, prompts, shift, shares, flush=True)
    if not quick:
        RESULT.write_text(json.dumps({"runs": runs, **content}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
