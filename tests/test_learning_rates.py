"""benchmarks/studies/learning_rates.py, on made-up curves."""

import json
from math import log2
from typing import Any

import numpy as np
import pytest

from benchmarks import measure
from benchmarks.studies.learning_rates import DIVERGED, GRID, curve, fit, is_judged, judge

OCTAVES = range(-16, -4)


def study(name: str, width: int, best: float, **changes: Any) -> dict[str, Any]:
    """A parabola with its lowest loss, 1, at this power of 2."""
    rates = {repr(2.0**at): 1 + 0.1 * (at - best) ** 2 for at in OCTAVES}
    row = {"network": name, "source": "tinker", "width": width, "steps": 100, "batch_size": 8, "rates": rates}
    return {**row, "base_loss": 3.0, "best": 2.0 ** round(best), "unit": "nats per token", "alpha": 32, **changes}


def test_a_divergence_counts_as_its_limit_and_hides_higher_rates() -> None:
    row = study("a", 64, -9)
    row["rates"] |= {repr(2.0**-6): None, repr(2.0**-5): None}
    found = curve(row)
    assert found.regret[np.argmin(abs(GRID + 6))] == pytest.approx(DIVERGED - 1)
    assert found.regret[np.argmin(abs(GRID + 5))] > DIVERGED - 1


def test_a_rule_by_width_wins_where_the_best_rate_follows_the_width() -> None:
    curves = [
        curve(study(f"network {width}", width, -11 - 0.5 * log2(width / 2048))) for width in 2 ** np.arange(6, 14)
    ]
    assert fit(curves, ("width",))[0] == pytest.approx([-11, -0.5])
    results = judge(curves, [(), ("width",)])
    assert results["width"]["beats"]
    assert results["width"]["regret"] < 0.01 < 0.1 < results["constant"]["regret"]


def test_no_rule_wins_where_all_networks_have_the_same_best_rate() -> None:
    curves = [curve(study(f"network {width}", width, -11)) for width in 2 ** np.arange(6, 14)]
    results = judge(curves, [(), ("width",)])
    assert results["width"]["parameters"] == [-11.0, 0.0]
    assert not results["width"]["beats"]


def test_results_are_of_the_stored_studies() -> None:
    rows = json.loads((measure.RESULTS / "learning_rates.json").read_text())["studies"]
    results = json.loads((measure.RESULTS / "learning_rate_rules.json").read_text())["rules"]["all"]
    curves = [curve(row) for row in rows if is_judged(row)]
    parameters, regret = fit(curves, ("width",))
    assert results["width"]["parameters"] == parameters
    assert list(results["width"]["of"].values()) == pytest.approx(regret.tolist(), abs=1e-4)
