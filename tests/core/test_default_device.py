"""With `torch.set_default_device` everything is where its layer is, and the same as without it.

The default device here is "meta": a tensor that lands there has no contents, so its use shows.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_actions import ACTIONS

from tailora.train.state import random_state, seeded, set_random_state

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ACTIONS)
def test_the_default_device_changes_nothing(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = ACTIONS[name](CPU, tmp_path / "without")
    torch.manual_seed(0)
    with torch.device("meta"):
        actual = ACTIONS[name](CPU, tmp_path / "with")
    assert {key: value.device for key, value in actual.items()} == dict.fromkeys(expected, CPU)
    assert all(torch.equal(value, expected[key]) for key, value in actual.items())


def test_random_states_are_on_the_cpu_and_of_every_generator() -> None:
    def draws() -> list[float]:
        return [random.gauss(), np.random.standard_normal(), random.random(), float(torch.rand((), device=CPU))]

    draws()  # Python and numpy keep the second of two normal numbers for the next call
    states, expected = random_state(), draws()
    set_random_state(states)
    with torch.device("meta"), seeded(3):
        set_random_state(random_state())
    assert draws() == expected
    assert {state.device for state in states.values()} == {CPU}
