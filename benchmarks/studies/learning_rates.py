"""Does any simple rule choose a better learning rate than one constant for everything?

    python -m benchmarks.studies.learning_rates      judges rules on benchmarks/results/learning_rates.json

The rules of judging were written before the first fit. The losses had been read by then, and an earlier calculation had
found that Tinker's own formula does not beat a constant 3e-4 on its sweep.

Curves    A curve is the loss by learning rate of one study, model and rank. Judged are curves in nats per token with
          alpha = 16 or 32 whose best rate is bracketed: a lower and a higher rate were worse, or the higher diverged.
Regret    The loss at a rate minus the curve's lowest loss. Between measured rates, the loss is interpolated in the
          logarithm of the rate (PCHIP, which has its minimum at a measured rate). Beyond them it goes on as a line
          through the last two points, at low rates no higher than the loss before training. A run that diverged
          counts as a loss of 2, the limit from which Tinker's file leaves out a run.
Networks  Models of the same shapes, such as a base model and its instruct version, are one network, which is left out
          as a whole. A network's regret is the mean over its curves, and every network counts the same.
Rules     rate = 2^(a + b log2(width / 2048) + c log2(steps / 780) + d log2(batch size / 128)) with at most two of b,
          c and d other than 0. The constant has none. Of a grid (a in steps of 1/8, the others in steps of 1/10 from
          -1.5 to 1.5), the parameters with the lowest mean regret of the other networks are used; on a tie those
          closest to 0. Not fitted but shown for comparison: 5e-4, 3e-4, and Tinker's formula for Llama and Qwen.
Verdict   A rule beats the best constant if (1) the interval of the mean difference of their regrets lies below 0 over
          all networks, each left out in turn, and (2) over the networks of Tinker's sweep alone, the mean difference
          is at most 0.002 nats. The interval is of 20,000 bootstrap samples of the networks, 95% for all six rules
          together (Bonferroni).
Default   If a rule wins, it becomes `--learning-rate auto`. Otherwise the default is the best of 1, 2, 3 and 5 times a
          power of ten by the mean regret over all networks.
Limits    Width, steps and batch size vary together: within Tinker's sweep only the width varies. So that each result
          can be told from its assumptions, it is repeated (i) on the sweep alone, (ii) without the tiny model, (iii)
          with the rank nearest to 16 alone, (iv) with lines between the points, (v) with a divergence at a loss of 1,
          and (vi) with the studies that give only a best rate, for a constant and the width. Their curve is a parabola
          in log2(rate), whose curvature is the median over the judged curves, a quarter of it, and four times it.
Not measured: the sharpness of the loss in the first steps, as lr_range measures it. It needs runs of each model.
"""

import json
from itertools import combinations, product
from math import log2
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from benchmarks import measure

Floats = NDArray[np.float64]
Row = dict[str, Any]  # of learning_rates.json

REFERENCE = {"width": 2048, "steps": 780, "batch_size": 128}
LOWEST, FINENESS = -20, 32  # log2 of the lowest rate of GRID, and its points per octave; it ends at a rate of 1
GRID: Floats = np.arange(LOWEST * FINENESS, 1) / FINENESS
LEVELS, EXPONENTS = np.arange(-16, -4, 1 / 8), np.arange(-15, 16) / 10
RULES = [features for count in range(3) for features in combinations(REFERENCE, count)]
DRAWS, NO_HARM, DIVERGED = 20_000, 0.002, 2.0


class Curve(NamedTuple):
    row: Row
    regret: Floats  # at the rates of GRID


def is_judged(row: Row) -> bool:
    rates = [float(rate) for rate in row["rates"] or ()]
    return row["unit"] == "nats per token" and row["alpha"] in (16, 32) and min(rates) < row["best"] < max(rates)


def curve(row: Row, *, lines: bool = False, diverged: float = DIVERGED) -> Curve:
    """lines: between the points, instead of PCHIP.    diverged: loss of a run that diverged."""
    points = sorted((log2(float(rate)), loss) for rate, loss in row["rates"].items())
    end = next((i for i, (_, loss) in enumerate(points, 1) if loss is None), None)
    x, y = np.array([(at, diverged if loss is None else loss) for at, loss in points[:end]]).T
    losses = np.interp(GRID, x, y) if lines else PchipInterpolator(x, y)(np.clip(GRID, x[0], x[-1]))
    slopes = np.diff(y) / np.diff(x)
    below = np.minimum(y[0] + slopes[0] * (GRID - x[0]), row["base_loss"] or np.inf)
    losses = np.select([x[0] > GRID, x[-1] < GRID], [below, y[-1] + slopes[-1] * (GRID - x[-1])], losses)
    return Curve(row, losses - y.min())


def parabolas(rows: list[Row], curves: list[Curve], factor: float) -> list[Curve]:
    """Returns curves of the studies without losses. factor: of the median curvature of the other curves."""
    near = [np.abs(GRID - log2(curve.row["best"])) <= 1 for curve in curves]
    bends = [np.polyfit(GRID[at], curve.regret[at], 2)[0] for at, curve in zip(near, curves, strict=True)]
    bend = float(factor * np.median(bends))
    return [Curve(row, bend * (GRID - log2(row["best"])) ** 2) for row in rows if not row["rates"]]


def regrets(curves: list[Curve], log_rates: Floats) -> Floats:
    """log_rates: (..., curves).    Returns (..., networks), the networks in order of their names."""
    networks = sorted({curve.row["network"] for curve in curves})
    at = np.clip(np.rint((log_rates - LOWEST) * FINENESS), 0, len(GRID) - 1).astype(int)
    of_curves = np.array([curve.regret for curve in curves])[np.arange(len(curves)), at]
    share = np.array([[curve.row["network"] == name for name in networks] for curve in curves], dtype=float)
    return np.asarray(of_curves @ (share / share.sum(0)))


def fit(curves: list[Curve], features: tuple[str, ...]) -> tuple[list[float], Floats]:
    """Returns the parameters for all networks, and each network's regret with those for the others."""
    values = [log2(curve.row[name] / REFERENCE[name]) for name in features for curve in curves]
    x = np.array(values).reshape(-1, len(curves))
    exponents = sorted(product(EXPONENTS, repeat=len(features)), key=lambda each: sum(map(abs, each)))  # closest to 0
    parameters = np.array([(level, *each) for each in exponents for level in LEVELS])
    table = np.concatenate([regrets(curves, part[:, :1] + part[:, 1:] @ x) for part in np.array_split(parameters, 32)])
    total = table.sum(1, keepdims=True)
    best, others = (np.argmin(np.round(sums, 9), axis=0) for sums in (total, total - table))
    return parameters[best[0]].tolist(), table[others, np.arange(len(others))]


def judge(curves: list[Curve], rules: list[tuple[str, ...]] = RULES) -> dict[str, Any]:
    """Returns the results of each rule; `of` is each network's regret."""
    networks = dict(sorted({curve.row["network"]: curve.row["source"] for curve in curves}.items()))
    swept = np.array([source == "tinker" for source in networks.values()])
    of_constant, tail, results = fit(curves, ())[1], 0.025 / (len(RULES) - 1), {}
    for features in rules:
        parameters, regret = fit(curves, features)
        worse = regret - of_constant
        low, high = np.quantile(np.random.default_rng(0).choice(worse, (DRAWS, len(worse))).mean(1), [tail, 1 - tail])
        result = {"regret": regret.mean(), "difference": worse.mean(), "low": low, "high": high}
        result |= {"in_sweep": worse[swept].mean(), "beats": high < 0 and worse[swept].mean() <= NO_HARM}
        result = {key: np.asarray(value).item() for key, value in result.items()}
        of = dict(zip(networks, np.round(regret, 4).tolist(), strict=True))
        results[", ".join(features) or "constant"] = {"parameters": parameters, **result, "of": of}
    return results


def main() -> None:
    rows: list[Row] = json.loads((measure.RESULTS / "learning_rates.json").read_text())["studies"]
    judged = sorted(filter(is_judged, rows), key=lambda row: abs(log2(row["rank"] / 17)))  # 64 before 4
    curves, few = [curve(row) for row in judged], RULES[:2]  # few: a constant, and the width
    nearest = {(r["source"], r["model"], r["data"], r["batch_size"], r["steps"]): r for r in reversed(judged)}
    cases = {
        "all": judge(curves),
        "the sweep alone": judge([each for each in curves if each.row["source"] == "tinker"], few),
        "without the tiny model": judge([each for each in curves if each.row["network"] != "tiny model"]),
        "rank nearest to 16": judge([curve(row) for row in nearest.values()]),
        "lines": judge([curve(row, lines=True) for row in judged]),
        "divergence at 1": judge([curve(row, diverged=1.0) for row in judged]),
        **{f"best rates, x {by:g}": judge([*curves, *parabolas(rows, curves, by)], few) for by in (0.25, 1, 4)},
    }
    powers = np.array([0.781 if "Llama" in row["network"] else 0.0775 for row in judged])  # meant for Llama and Qwen
    rates = {f"{rate:.0e}": np.full(len(curves), log2(rate)) for rate in (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3)}
    rates["Tinker"] = log2(5e-4) + powers * np.log2([2000 / row["width"] for row in judged])
    networks = cases["all"]["constant"]["of"]
    fixed = {
        name: dict(zip(networks, np.round(regrets(curves, at), 4).tolist(), strict=True)) for name, at in rates.items()
    }
    for result in (result for results in list(cases.values())[1:] for result in results.values()):
        del result["of"]
    measure.write("learning_rate_rules", {"rules": cases, "fixed": fixed})


if __name__ == "__main__":
    main()
