"""Finds the best learning rate of a variant in a few runs."""

import math
from dataclasses import dataclass, field

COARSE, FINE = 4.0, 2.0


@dataclass
class LearningRateSearch:
    """`next_rate` returns the rate to try, `record` stores its loss; repeat until `next_rate` returns None.

    It moves in steps of a factor of 4 from the first rate until the best rate has a worse one on either side. Then it
    tries once at a factor of 2 from the best. The loss is flat near its minimum (a factor of 2 costs a few thousandths
    of a nat), so a finer search is not worth its runs.
    """

    first_rate: float
    tries: int  # maximum number of rates, at least 1
    tried: dict[float, float] = field(default_factory=dict)  # rate -> loss
    fits: bool = True  # into memory; the same for every rate

    def next_rate(self) -> float | None:
        if len(self.tried) >= self.tries or not self.fits:
            return None
        if not self.tried:
            return self.first_rate
        best = self.best
        if best is None:  # all diverged
            return min(self.tried) / COARSE**2
        if best == max(self.tried):
            return best * COARSE
        if best == min(self.tried):
            return best / COARSE
        # Try a factor of 2 from the best, on the side of the better neighbor, unless it was tried before.
        finer = best * FINE, best / FINE
        candidates = [rate for rate in finer if not any(math.isclose(rate, tried) for tried in self.tried)]
        if not candidates:
            return None
        above = min(rate for rate in self.tried if rate > best)
        below = max(rate for rate in self.tried if rate < best)
        return max(candidates) if self.tried[above] < self.tried[below] else min(candidates)

    def record(self, rate: float, loss: float, *, fits: bool = True) -> None:
        """loss: infinite for a run that diverged. fits: into memory."""
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
