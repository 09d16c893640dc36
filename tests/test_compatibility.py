"""docs/compatibility.md: its tables have every server and format of weights, and some cells that are run again."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tailora.formats.serving_targets import TARGETS
from tailora.train.model_loading import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "compatibility.json").read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/compatibility.py, which imports measure.py beside it."""
    path = ROOT / "benchmarks" / "compatibility.py"
    spec = importlib.util.spec_from_file_location("compatibility", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = [*sys.path]
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def test_every_server_and_every_format_of_weights_is_in_its_table(script: ModuleType) -> None:
    assert RESULTS["servers"].keys() == {*TARGETS, script.OWN_SERVER}
    assert RESULTS["quantization"].keys() == {"float32", "bfloat16", *METHODS}
    assert all(row.keys() == script.FEATURES.keys() for row in RESULTS["servers"].values())
    assert all(row.keys() == script.ARCHITECTURE_CHECKS.keys() for row in RESULTS["architectures"].values())


@pytest.mark.filterwarnings("ignore:r = 48 becomes the smaller side")
@pytest.mark.parametrize(
    ("server", "feature"),
    [
        ("tgi", "one block only"),  # merged
        ("mlx", "output head"),
        ("cloudflare", "r = 48"),  # refused
    ],
)
def test_a_cell_of_the_servers_is_what_the_script_finds_today(script: ModuleType, server: str, feature: str) -> None:
    found = script.outcome(script.server_cell, server, script.FEATURES[feature])
    assert found == RESULTS["servers"][server][feature]
