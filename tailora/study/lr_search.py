"""The search for the learning rate of one arm, with as few runs as an honest comparison allows.

It goes from the first rate in steps of a factor of 4 until the best rate has a worse one on either side, then tries
once at a factor of 2 from the best. The loss is flat near its best (a factor of 2 costs a few thousandths of a nat), so
a finer search is not worth its runs.
"""

import math

COARSE, FINE = 4.0, 2.0


class LearningRateSearch:
    """`next_rate` gives the rate to try, `record` takes its loss; repeat until `next_rate` gives None."""

    def __init__(self, first_rate: float, tries: int) -> None:
        """tries: the most rates in all, at least 1."""
        self.tries = tries
        self.tried: dict[float, float] = {}  # rate -> loss
        self.fits = True  # into memory, which is the same for every rate
        self._first_rate = first_rate

    def next_rate(self) -> float | None:
        if len(self.tried) >= self.tries or not self.fits:
            return None
        if not self.tried:
            return self._first_rate
        best = self.best
        if best is None:  # all diverged
            return min(self.tried) / COARSE**2
        if best == max(self.tried):
            return best * COARSE
        if best == min(self.tried):
            return best / COARSE
        # At a factor of 2 from the best, on the side of the better neighbour, unless that was tried.
        candidates = [
            rate for rate in (best * FINE, best / FINE) if not any(math.isclose(rate, tried) for tried in self.tried)
        ]
        if not candidates:
            return None
        above = min(rate for rate in self.tried if rate > best)
        below = max(rate for rate in self.tried if rate < best)
        return max(candidates) if self.tried[above] < self.tried[below] else min(candidates)

    def record(self, rate: float, loss: float, *, fits: bool = True) -> None:
        """loss: infinite for a run that diverged.    fits: whether the run fitted into memory."""
        self.tried[rate] = loss if math.isfinite(loss) else math.inf
        self.fits = self.fits and fits

    @property
    def best(self) -> float | None:
        """The rate with the lowest loss; None if all runs diverged."""
        finite = {rate: loss for rate, loss in self.tried.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__) if finite else None

    @property
    def losses(self) -> dict[float, float | None]:
        """Rate -> loss, None for a run that diverged."""
        return {rate: loss if math.isfinite(loss) else None for rate, loss in self.tried.items()}

    @property
    def bracketed(self) -> bool:
        """True if a lower and a higher rate were both worse than the best."""
        return self.best is not None and min(self.tried) < self.best < max(self.tried)
