"""How the held-out loss depends on the number of training examples, and what more of them would bring.

    loss(k) = c + g h(k),  h(k) = (2^(-alpha k) - 1) / (2^alpha - 1)     after k doublings of the largest size measured

c is the loss at that size, g >= 0 its decrease over the last doubling. The candidates are power laws with any limit
c - g / (2^alpha - 1) >= 0 (arXiv:1712.00409) or with the limit 0, a line (alpha -> 0), and a flat curve (g = 0). Three
to five sizes cannot tell them apart, so `fit` selects none, but computes the posterior of all on a grid of alpha, g and
the noise, and integrates over c. alpha < 0 stands for the first part of a fine-tuning curve, where each doubling brings
more than the one before (arXiv:2402.02314). Points also deviate from the curve by a share of g, in all seeds alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tailora.evaluation.statistics import Floats, Interval

LEVEL = 0.9  # of the intervals
FORECASTS = False  # whether `curve` shows forecasts: only if they pass benchmarks/studies/scaling_rules.py
DRAWS = 4000
PRIORS = {"power law": 0.6, "power law to zero": 0.1, "log-linear": 0.1, "flat": 0.2}
ALPHAS = np.linspace(-1.0, 1.8, 57)
ALPHA_MEAN, ALPHA_SPREAD = 0.4, 0.4  # of the normal prior of alpha
DEVIATION = 0.15  # standard deviation of a point from the curve, as a share of g
GAINS, NOISES = 61, 25  # points of the grid


@dataclass(frozen=True, eq=False)
class ScalingFit:
    """Draws from the posterior; all (draws,).

    largest: the largest size measured.    weights: candidate -> its probability.
    loss: at the largest size.    gain, alpha: of the curve.    deviation: of a new point from the curve.
    noise: of one run, without what its seed changes at all sizes.
    """

    largest: float
    weights: dict[str, float]
    loss: Floats
    gain: Floats
    alpha: Floats
    deviation: Floats
    noise: Floats

    def curve(self, size: float) -> Floats:
        """Returns draws of the curve at this size."""
        return self.loss + self.gain * shape(self.alpha, np.log2(size / self.largest))

    def forecast(self, size: float, seeds: int) -> Interval:
        """Returns the mean loss of `seeds` runs with a size that was not measured."""
        return interval(self.curve(size) + self.deviation + self.noise / np.sqrt(seeds))

    def change(self, times: float, error: float = 0.0) -> Interval:
        """Returns the expected change of the loss with `times` as many examples as the largest size.

        error: its standard error from the choice of held-out examples.
        """
        return interval(self.curve(times * self.largest) - self.loss + self.deviation, error)

    def difference(self, value: float, error: float, seeds: int) -> Interval:
        """Returns a measured difference of two means of `seeds` runs, with an interval from the noise of all sizes."""
        return interval(value + self.noise * np.sqrt(2 / seeds), error)


def interval(draws: Floats, error: float = 0.0) -> Interval:
    """Returns the median and the ends of the 90% interval. error: standard deviation of a further, normal error."""
    draws = draws + error * np.random.default_rng(1).normal(size=DRAWS)
    low, value, high = np.quantile(draws, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2]).tolist()
    return Interval(value, low, high)


def shape(alpha: ArrayLike, doublings: ArrayLike) -> Floats:
    """Returns h(k): 0 at the largest size, 1 at half of it."""
    exponent, k = np.asarray(alpha, dtype=np.float64), np.asarray(doublings, dtype=np.float64)
    is_line = np.abs(exponent) < 1e-6
    safe = np.where(is_line, 1.0, exponent) * np.log(2)
    return np.where(is_line, -k, np.expm1(-safe * k) / np.expm1(safe))


def fit(sizes: Sequence[float], losses: ArrayLike) -> ScalingFit:
    """Returns the posterior of the curve.

    sizes: numbers of examples, increasing.    losses: (sizes, seeds), with the same seeds at each size.
    Raises ValueError for fewer than three sizes or two seeds.
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != len(sizes) or len(sizes) < 3 or values.shape[1] < 2:
        raise ValueError(f"expected losses (sizes, seeds) of 3 sizes and 2 seeds or more, got {values.shape}")
    (count, seeds), means = values.shape, values.mean(1)
    doublings = np.log2(np.asarray(sizes, dtype=np.float64) / sizes[-1])
    # A seed that is better at all sizes says nothing about the curve
    squares = float(((values - means[:, None] - values.mean(0) + values.mean()) ** 2).sum())
    degrees = (count - 1) * (seeds - 1)
    spread = float(np.sqrt(squares / degrees)) or 1e-6 * float(np.abs(means).mean()) or 1e-9
    noise = np.geomspace(spread / 5, 5 * spread + np.ptp(means), NOISES)  # (noises,)
    scale = 1.5 * float(np.ptp(means)) / float(-doublings[0]) + spread / np.sqrt(seeds)  # of the prior of g
    gain = np.linspace(0.0, 4 * scale, GAINS)  # (gains,)

    alpha, prior = _grid(gain, scale, float(means[-1]))  # both (candidates, gains)
    rest = means - gain[:, None] * shape(alpha[..., None], doublings)  # (candidates, gains, sizes)
    level = rest.mean(-1)
    distance = ((rest - level[..., None]) ** 2).sum(-1)[..., None]  # (candidates, gains, 1)
    variance = noise**2 / seeds + (DEVIATION * gain[:, None]) ** 2  # (gains, noises)
    likelihood = -(count - 1) / 2 * np.log(variance) - distance / (2 * variance)  # of the means
    likelihood += -degrees * np.log(noise) - squares / (2 * noise**2)  # of the differences between seeds
    probability = prior[..., None] * np.exp(likelihood - likelihood.max())  # (candidates, gains, noises)
    probability /= probability.sum()

    random = np.random.default_rng(0)
    drawn = np.unravel_index(random.choice(probability.size, DRAWS, p=probability.ravel()), probability.shape)
    row, column, depth = drawn
    parts = np.split(probability.sum((1, 2)), [len(ALPHAS), len(ALPHAS) + 1, len(ALPHAS) + 2])
    return ScalingFit(
        largest=float(sizes[-1]),
        weights={name: float(part.sum()) for name, part in zip(PRIORS, parts, strict=True)},
        loss=level[row, column] + np.sqrt(variance[column, depth] / count) * random.normal(size=DRAWS),
        gain=gain[column],
        alpha=alpha[row, column],
        deviation=DEVIATION * gain[column] * random.normal(size=DRAWS),
        noise=noise[depth] * random.normal(size=DRAWS),
    )


def _grid(gain: Floats, scale: float, last: float) -> tuple[Floats, Floats]:
    """Returns alpha and the prior of every candidate at every g, (alphas + 3, gains).

    scale: of the half-normal prior of g.    last: the loss at the largest size.
    """
    of_gain, of_alpha = np.exp(-((gain / scale) ** 2) / 2), np.exp(-(((ALPHAS - ALPHA_MEAN) / ALPHA_SPREAD) ** 2) / 2)
    of_gain = np.where(gain > 0, of_gain, 0.0) / of_gain[gain > 0].sum()
    to_zero = np.log2(1 + gain / max(last, 1e-9))
    is_possible = (ALPHAS[:, None] <= 0) | (ALPHAS[:, None] >= to_zero)  # a loss is at least 0
    power_law = (of_alpha / of_alpha.sum())[:, None] * of_gain * is_possible
    alpha = np.vstack([np.repeat(ALPHAS[:, None], len(gain), 1), to_zero, 0 * gain, 0 * gain])
    weights = np.repeat(list(PRIORS.values()), [len(ALPHAS), 1, 1, 1])
    return alpha, weights[:, None] * np.vstack([power_law, of_gain, of_gain, gain == 0])
