"""benchmarks/studies/learning_rates.py, on made-up curves."""

import json
from math import log2
from typing import Any

import numpy as np
import pytest

from benchmarks import measure
from benchmarks.studies.learning_rates import DIVERGED, GRID, curve, fit, is_judged, judge, regrets

OCTAVES = range(-16, -4)


def study(name: str, width: int, best: float, **changes: Any) -> dict[str, Any]:
    """A parabola with its lowest loss, 1, at this power of 2."""
    rates = {repr(2.0**at): 1 + 0.1 * (at - best) ** 2 for at in OCTAVES}
    row = {"network": name, "source": "tinker", "width": width, "steps": 100, "batch_size": 8, "rates": rates}
    return {**row, "base_loss": 3.0, "best": 2.0 ** round(best), "unit": "nats per token", "alpha": 32, **changes}


def test_regret_is_0_at_the_best_rate_and_grows_to_the_loss_before_training() -> None:
    found = curve(study("a", 64, -9))
    at = {octave: found.regret[np.argmin(abs(GRID - octave))] for octave in (-20, -11, -9, -7)}
    assert at[-9] == 0
    assert at[-11] == at[-7] == pytest.approx(0.4)
    assert at[-20] == pytest.approx(2.0), "below the measured rates it stays at the loss before training"


def test_a_divergence_counts_as_its_limit_and_hides_higher_rates() -> None:
    row = study("a", 64, -9)
    row["rates"] |= {repr(2.0**-6): None, repr(2.0**-5): None}
    found = curve(row)
    assert found.regret[np.argmin(abs(GRID + 6))] == pytest.approx(DIVERGED - 1)
    assert found.regret[np.argmin(abs(GRID + 5))] > DIVERGED - 1


@pytest.mark.parametrize(
    "changes",
    [{"unit": "nats per example"}, {"alpha": 8}, {"best": 2.0**-16}, {"best": 2.0**-5}, {"unit": None, "rates": None}],
)
def test_judged_are_curves_that_show_the_best_rate(changes: dict[str, Any]) -> None:
    assert is_judged(study("a", 64, -9))
    assert not is_judged(study("a", 64, -9) | changes)


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


def test_a_network_counts_once_however_many_curves_it_has() -> None:
    twice = [curve(study("a", 64, best)) for best in (-9, -7)]
    assert regrets([*twice, curve(study("b", 64, -9))], np.full(3, -9.0)) == pytest.approx([0.2, 0.0])


def test_results_are_of_the_stored_studies() -> None:
    rows = json.loads((measure.RESULTS / "learning_rates.json").read_text())["studies"]
    results = json.loads((measure.RESULTS / "learning_rate_rules.json").read_text())["rules"]["all"]
    curves = [curve(row) for row in rows if is_judged(row)]
    parameters, regret = fit(curves, ("width",))
    assert results["width"]["parameters"] == parameters
    assert list(results["width"]["of"].values()) == pytest.approx(regret.tolist(), abs=1e-4)
