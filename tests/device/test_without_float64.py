"""On an accelerator without float64, such as Apple's, adapters become what they become on the CPU.

tests/gpu/test_card.py has the same test for accelerators with float64.
"""

from pathlib import Path

import pytest
import torch
from adapter_actions import ACTIONS
from pretend_accelerator import no_float64

pytestmark = pytest.mark.device


@pytest.mark.parametrize("name", ACTIONS)
def test_an_adapter_is_what_it_is_on_the_cpu(device: torch.device, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = ACTIONS[name](torch.device("cpu"), tmp_path / "cpu")
    torch.manual_seed(0)
    with no_float64():
        actual = {key: value.cpu() for key, value in ACTIONS[name](device, tmp_path / "device").items()}
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
