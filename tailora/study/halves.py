"""The held-out examples in two halves: one chooses settings, the other judges what was chosen."""

import numpy as np
from numpy.typing import NDArray

from tailora.errors import ConfigError

Places = NDArray[np.int64]


def halves(count: int) -> tuple[Places, Places]:
    """Places of the choosing and of the judging examples, always the same for a count. Raises ConfigError below 4."""
    if count < 4:
        there = "1 held-out example is" if count == 1 else f"{count} held-out examples are"
        raise ConfigError(
            f"{there} too few: one half chooses settings, the other judges. Hold out at least 4, better 100: "
            "--eval-data FILE, or a larger --validation-split"
        )
    shuffled = np.random.default_rng(0).permutation(count)
    return np.sort(shuffled[: count // 2]), np.sort(shuffled[count // 2 :])


def choosing_half(count: int) -> Places:
    return halves(count)[0]


def judging_half(count: int) -> Places:
    return halves(count)[1]
