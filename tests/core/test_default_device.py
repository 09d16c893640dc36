"""With `torch.set_default_device` everything is where its layer is, and the same as without it.

The default device here is "meta": a tensor that lands there has no contents, so its use shows.
"""

from pathlib import Path

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


def test_random_states_are_on_the_cpu() -> None:
    with torch.device("meta"), seeded(3):
        states = random_state()
        set_random_state(states)
    assert {state.device for state in states.values()} == {CPU}
