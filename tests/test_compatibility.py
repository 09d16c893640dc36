"""docs/compatibility.md: its tables have every server and format of weights, and some cells that are run again."""

import json
from pathlib import Path

import pytest

from benchmarks.serving import compatibility
from tailora.formats.serving_targets import TARGETS
from tailora.train.quantize import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "compatibility.json").read_text())


def test_every_server_and_every_format_of_weights_is_in_its_table() -> None:
    assert RESULTS["servers"].keys() == {*TARGETS, compatibility.OWN_SERVER}
    assert RESULTS["quantization"].keys() == {"float32", "bfloat16", *METHODS}
    assert all(row.keys() == compatibility.FEATURES.keys() for row in RESULTS["servers"].values())
    assert all(row.keys() == compatibility.ARCHITECTURE_CHECKS.keys() for row in RESULTS["architectures"].values())


@pytest.mark.parametrize(
    ("server", "feature"),
    [
        ("vllm", "output head"),  # merged
        ("mlx", "output head"),
    ],
)
def test_a_cell_of_the_servers_is_what_the_script_finds_today(server: str, feature: str) -> None:
    found = compatibility.outcome(compatibility.server_cell, server, compatibility.FEATURES[feature])
    assert found == RESULTS["servers"][server][feature]
