"""Two ways of training on the same examples and the same seeds: is there a difference, and how sure is that?

A model of the losses: difference of seed j on example i = mu + example effect + seed effect + rest. More examples do
not make up for few seeds, nor the other way round, so both count: the variance of the mean comes from the mean squares
of examples, seeds and rest (crossed random effects), its degrees of freedom from Satterthwaite (Biometrics 2, 1946).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tailora.evaluation.intervals import Interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Of two losses in nats per token, second - first, with what is known about it."""

    value: float
    low: float  # ends of the interval
    high: float
    p_value: float  # two-sided, of no difference
    examples: int
    seeds: int
    from_examples: float  # share of the variance that more examples would take away; the rest takes more seeds


def difference(first: ArrayLike, second: ArrayLike, counts: ArrayLike, *, level: float = 0.95) -> Difference:
    """first, second: nats (seeds, examples); counts: tokens of each example, (examples,).

    With one seed the spread over seeds is unknown and left out: the interval is too narrow then, and `seeds` says 1.
    Raises ValueError for shapes that do not fit, fewer than two examples, or values that are not finite.
    """
    from scipy import stats  # an optional package

    apart, tokens = _checked_pairs(first, second, counts)
    seeds, examples = apart.shape
    value = float(apart.sum() / (seeds * tokens.sum()))
    rest = (apart - value * tokens) / tokens.mean()  # (seeds, examples), the ratio linearised; mean 0
    by_example, by_seed = rest.mean(0), rest.mean(1)
    of_examples = seeds * (by_example**2).sum() / (examples - 1)  # mean squares
    if seeds == 1:
        squares, degrees = of_examples, float(examples - 1)
        share = 1.0
    else:
        of_seeds = examples * (by_seed**2).sum() / (seeds - 1)
        of_rest = ((rest - by_example - by_seed[:, None]) ** 2).sum() / ((examples - 1) * (seeds - 1))
        squares = max(of_examples + of_seeds - of_rest, of_examples, of_seeds)
        parts = (of_examples**2 / (examples - 1), of_seeds**2 / (seeds - 1))
        degrees = float(squares**2 / sum(parts)) if squares > 0 else 1.0
        total = of_examples + of_seeds
        share = float(of_examples / total) if total > 0 else 0.5
    error = float(np.sqrt(squares / (seeds * examples)))
    if error == 0:
        return Difference(value, value, value, float(value == 0), examples, seeds, share)
    half = float(stats.t.ppf((1 + level) / 2, degrees)) * error
    p_value = float(2 * stats.t.sf(abs(value) / error, degrees))
    return Difference(value, value - half, value + half, p_value, examples, seeds, share)


def _checked_pairs(first: ArrayLike, second: ArrayLike, counts: ArrayLike) -> tuple[Floats, Floats]:
    one, two, tokens = (np.asarray(each, dtype=np.float64) for each in (first, second, counts))
    if one.ndim != 2 or one.shape != two.shape or tokens.shape != one.shape[1:]:
        raise ValueError(
            f"shapes {one.shape}, {two.shape}, {tokens.shape}; needed are (seeds, examples) twice, (examples,)"
        )
    judged = tokens > 0
    if judged.sum() < 2:
        raise ValueError("fewer than two examples have tokens that count")
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise ValueError("a loss is not finite")
    return (two - one)[:, judged], tokens[judged]


def loss_interval(
    sums: ArrayLike, counts: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Loss per token over seeds and examples, both drawn with replacement. sums: nats (seeds, examples)."""
    nats, tokens = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    seeds, examples = nats.shape
    value = float(nats.sum() / (seeds * tokens.sum()))
    generator = np.random.default_rng(seed)
    losses = np.empty(draws)
    for draw in range(draws):
        times = np.bincount(generator.integers(examples, size=examples), minlength=examples)
        chosen = nats[generator.integers(seeds, size=seeds)]
        losses[draw] = (chosen @ times).sum() / (seeds * (tokens @ times))
    low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for looking several times (Holm, Scand. J. Statist. 6, 1979)."""
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted
