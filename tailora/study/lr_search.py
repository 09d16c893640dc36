"""The learning rate of one arm, found by as few runs as an honest comparison allows: asked for, then told.

From the prior in steps of 4 until the best is bracketed, then once in steps of 2 around it. The loss is flat near its
best (a factor of 2 costs a few thousandths of a nat), so nothing finer is worth a run.
"""

import math

COARSE, FINE = 4.0, 2.0


class Rates:
    """`ask` for the rate to try next, `tell` its loss (infinite for one that diverged), until `ask` gives None."""

    def __init__(self, prior: float, tries: int) -> None:
        """prior: where to begin.    tries: most rates in all, at least 1."""
        self.tries = tries
        self.tried: dict[float, float] = {}
        self.fits = True
        self._prior = prior

    def ask(self) -> float | None:
        if len(self.tried) >= self.tries or not self.fits:
            return None
        return self._prior if not self.tried else self._next()

    def tell(self, rate: float, loss: float, *, fits: bool = True) -> None:
        """fits: whether memory was enough, which no other rate would change."""
        self.tried[rate] = loss if math.isfinite(loss) else math.inf
        self.fits = self.fits and fits

    @property
    def best(self) -> float | None:
        """The rate of the lowest loss; None when all diverged."""
        finite = {rate: loss for rate, loss in self.tried.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__) if finite else None

    @property
    def bracketed(self) -> bool:
        """Whether a lower and a higher rate were both worse than the best."""
        return self.best is not None and min(self.tried) < self.best < max(self.tried)

    def _next(self) -> float | None:
        best = self.best
        if best is None:
            return min(self.tried) / COARSE**2  # all diverged
        if best == max(self.tried):
            return best * COARSE
        if best == min(self.tried):
            return best / COARSE
        around = [best * FINE, best / FINE]
        missing = [rate for rate in around if not any(math.isclose(rate, other) for other in self.tried)]
        return self._nearer(missing) if missing else None

    def _nearer(self, candidates: list[float]) -> float:
        """The candidate on the side of the better neighbour."""
        best = self.best
        assert best is not None
        above = min(rate for rate in self.tried if rate > best)
        below = max(rate for rate in self.tried if rate < best)
        upward = self.tried[above] < self.tried[below]
        return max(candidates) if upward else min(candidates)
