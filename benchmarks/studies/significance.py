"""How often the rule for better and worse is wrong, and how often its interval contains the true change.

    python -m benchmarks.studies.significance          2,000 runs per case; writes results/significance.json
    python -m benchmarks.studies.significance --quick  200 runs per case; writes nothing

Both models draw their scores from one distribution (A/A), or from two with a known change. `change_of` judges every
run, as it does in `tailora train` and `tailora eval`. "best of ten" draws ten checkpoints for each run,
chooses the best one on the selection half of the prompts, and judges it on the other half.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tailora.data.dataset import ENOUGH_TO_HALVE, selection_half
from tailora.train.significance import FEWEST, change_of

RESULT = Path(__file__).parents[1] / "results" / "significance.json"
PROMPTS = (10, 20, 50, 100, 200, 500)
LARGEST_CLUSTER, CHECKPOINTS = 7, 10
Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, Floats], Floats]  # difficulty of each answer -> scores, both (runs, answers)


@dataclass(frozen=True)
class Case:
    """before, after: draw the scores of a model.

    change: the true one, of the mean score.
    is_clustered: clusters have 1 to LARGEST_CLUSTER answers, which share most of their difficulty and of what differs
        between the two models. Otherwise, each prompt has one answer.
    """

    before: Draw
    after: Draw
    change: float = 0.0
    is_continuous: bool = True
    is_clustered: bool = False


def _right(mean: float, spread: float = 1.0) -> Draw:
    """Scores of 0 or 1. spread: of the chance among the prompts, which keeps the mean."""

    def draw(random: np.random.Generator, difficulty: Floats) -> Floats:
        chance = mean + spread * min(mean, 1 - mean) * np.tanh(difficulty)
        return (random.random(difficulty.shape) < chance).astype(np.float64)

    return draw


def _normal(mean: float = 0.0) -> Draw:
    return lambda random, difficulty: mean + difficulty + random.normal(size=difficulty.shape)


def _lognormal(factor: float = 1.0, spread: float = 0.5) -> Draw:
    return lambda random, difficulty: factor * np.exp(0.5 * difficulty + random.normal(0, spread, difficulty.shape))


def _lognormal_mean(spread: float = 0.5) -> float:
    return float(np.exp(0.5 * (0.5**2 + spread**2)))


def _mostly_equal(random: np.random.Generator, difficulty: Floats) -> Floats:
    """Two of three greedy answers are the same before and after."""
    return difficulty + (random.random(difficulty.shape) < 0.18) * random.normal(size=difficulty.shape)


SAME: dict[str, Case] = {
    "0/1": Case(_right(0.5), _right(0.5), is_continuous=False),
    "0/1, rarely right": Case(_right(0.05), _right(0.05), is_continuous=False),
    "0/1, clustered": Case(_right(0.5), _right(0.5), is_continuous=False, is_clustered=True),
    "normal": Case(_normal(), _normal()),
    "normal, clustered": Case(_normal(), _normal(), is_clustered=True),
    "mostly equal": Case(_mostly_equal, _mostly_equal),
    "lognormal": Case(_lognormal(), _lognormal()),
}
CHANGED: dict[str, Case] = {
    "0/1, 40% to 60%": Case(_right(0.4), _right(0.6), 0.2, is_continuous=False),
    "normal": Case(_normal(), _normal(0.5), 0.5),
    "normal, clustered": Case(_normal(), _normal(0.5), 0.5, is_clustered=True),
    "lognormal": Case(_lognormal(), _lognormal(1.3), 0.3 * _lognormal_mean()),
    "long tail, doubled": Case(_lognormal(1, 1), _lognormal(2, 1), _lognormal_mean(1)),
}


def draw_sums(
    case: Case, clusters: int, runs: int, seed: int, models: int = 1
) -> tuple[Floats, list[Floats], NDArray[np.int64]]:
    """Returns sums of scores before and of each model after, all (runs, clusters), and the number of answers."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, LARGEST_CLUSTER + 1, clusters) if case.is_clustered else np.ones(clusters, np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])

    def shared(share: float) -> Floats:
        """Normal values of variance 1 for each answer, of which the answers of a cluster share a part."""
        of_cluster = np.repeat(random.normal(size=(runs, clusters)), counts, axis=1)
        return np.sqrt(share) * of_cluster + np.sqrt(1 - share) * random.normal(size=of_cluster.shape)

    difficulty = shared(0.7 if case.is_clustered else 0.0)

    def sums(draw: Draw) -> Floats:
        own = np.sqrt(0.5) * (difficulty + shared(0.7)) if case.is_clustered else difficulty
        return np.add.reduceat(draw(random, own), starts, axis=1)

    return sums(case.before), [sums(case.after) for _ in range(models)], counts


def simulate(case: Case, prompts: int, runs: int, seed: int = 0) -> dict[str, float]:
    """Returns shares of the runs. prompts: number of clusters."""
    before, (after,), counts = draw_sums(case, prompts, runs, seed)
    changes = [change_of(*sides, counts) for sides in zip(before, after, strict=True)]
    found = [change.finding for change in changes]
    covered = [change.interval.low <= case.change <= change.interval.high for change in changes]
    shares = {name: found.count(name) / runs for name in ("better", "worse")}  # type: ignore[arg-type]
    return {**shares, "coverage": float(np.mean(covered))}


def simulate_best_of_ten(case: Case, prompts: int, runs: int, seed: int = 0) -> dict[str, float]:
    """Returns the shares of runs that are called better or worse, with and without halves."""
    before, checkpoints, counts = draw_sums(case, prompts, runs, seed, CHECKPOINTS)
    chooses = np.isin(np.arange(prompts), selection_half(prompts))
    after = np.stack(checkpoints)  # (checkpoints, runs, clusters)
    wrong = {}
    for name, chosen, judged in (("halves", chooses, ~chooses), ("same prompts", chooses | True, chooses | True)):
        best = after[:, :, chosen].sum(2).argmax(0)  # (runs,)
        rows = zip(before[:, judged], after[best, np.arange(runs)][:, judged], strict=True)
        found = [change_of(*sides, counts[judged]).finding for sides in rows]
        wrong[name] = sum(finding != "cannot tell" for finding in found) / runs
    return wrong


def simulate_all(runs: int) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Returns part -> case -> number of prompts -> shares."""

    def each(cases: Mapping[str, Case], of: Callable[..., dict[str, float]], least: int = FEWEST) -> dict[str, dict]:
        return {
            name: {str(n): of(case, n, runs, seed=n) for n in PROMPTS if n >= least} for name, case in cases.items()
        }

    return {
        "same": each(SAME, simulate),
        "changed": each(CHANGED, simulate),
        "best of ten": each(SAME, simulate_best_of_ten, ENOUGH_TO_HALVE),
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 runs per case; writes nothing")
    quick = parser.parse_args().quick
    runs = 200 if quick else 2000
    results = simulate_all(runs)
    for part, cases in results.items():
        for name, sizes in cases.items():
            for prompts, shares in sizes.items():
                print(f"{part:<12} {name:<20} {prompts:>4}  " + "  ".join(f"{k} {v:.3f}" for k, v in shares.items()))
    if not quick:
        RESULT.write_text(json.dumps({"runs": runs, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
