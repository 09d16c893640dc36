"""Optuna's part of a search: what is proposed, and which settings mattered."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from tailora.errors import ConfigError, listing
from tailora.study.search_space import TARGETS, Axis, Range

RANDOM_TRIALS = 6  # before TPE has seen enough to model
BEST_SHARE = 0.25  # of the trials: what importances are about
FEWEST = 8  # trials, for two among the best quarter


def sampler(seed: int, number: int) -> TPESampler:
    """Of one trial: its proposals depend on seed, number and what is known, not on which process asks.

    Trials that others are running count as bad ones (constant liar), so that nobody tries the same next to them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=RANDOM_TRIALS, constant_liar=True)


def suggest(trial: optuna.Trial, axes: Mapping[str, Axis]) -> dict[str, Any]:
    """A value for every axis; an axis with one value is not searched."""
    values: dict[str, Any] = {}
    for name, axis in axes.items():
        if isinstance(axis, Range):
            values[name] = trial.suggest_float(name, axis.low, axis.high, log=axis.log)
        else:
            values[name] = axis[0] if len(axis) == 1 else trial.suggest_categorical(name, axis)
    return values


def axes(
    space: Mapping[str, Axis], parts: Mapping[str, Any], given: Mapping[str, Axis], note: Callable[[str], None]
) -> dict[str, Axis]:
    """The space as far as this model has it. parts: see `study.parts`.  given: what was asked for, not the default.

    Raises ConfigError for a value that was asked for and that the model cannot take.
    """
    found = {name: _fitting(name, axis, parts) for name, axis in space.items()}
    lost = {name: values for name, axis in space.items() if (values := _lost(axis, found[name]))}
    reasons = {name: f"{name} = {', '.join(map(str, values))}: {_why(name, parts)}" for name, values in lost.items()}
    if problems := [reason for name, reason in reasons.items() if name in given or not found[name]]:
        raise ConfigError(listing([f"space: {problem}" for problem in problems]))
    for reason in reasons.values():
        note(f"left out of the space: {reason}")
    return found


def _lost(axis: Axis, kept: Axis) -> list[Any]:
    return [] if isinstance(axis, Range) else [value for value in axis if value not in kept]


def _fitting(name: str, axis: Axis, parts: Mapping[str, Any]) -> Axis:
    if isinstance(axis, Range) or not parts:
        return axis
    if name == "r":
        return tuple(value for value in axis if value <= parts["largest_r"])
    if name == "target_modules":
        return tuple(value for value in axis if value not in TARGETS[1:] or value in parts)
    return axis


def _why(name: str, parts: Mapping[str, Any]) -> str:
    if name == "r":
        return f"the smallest matrix of the model takes ranks up to {parts['largest_r']}"
    return "the model's names do not tell its attention from its MLP; give names of layers, joined by +"


def importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Share of each setting in being among the best quarter (PED-ANOVA, arXiv:2304.10255); {} for too few trials.

    Trials that were pruned or diverged count as worse than all that were not.
    """
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    known = [trial for trial in trials if trial.state in states and trial.params]
    done = [trial.value for trial in known if trial.state == TrialState.COMPLETE and trial.value is not None]
    if len(known) < FEWEST or not done:
        return {}
    worst = max(done) + 1.0
    study = optuna.create_study()
    for trial in known:
        value = trial.value if trial.state == TrialState.COMPLETE else worst
        study.add_trial(optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE))
    return {name: float(value) for name, value in found.items()}
