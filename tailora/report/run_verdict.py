"""The verdict of a training run: whether it worked, in sentences, and flags to try if the model became worse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tailora.data.labels import Labels
from tailora.evaluation.answers import (
    FaultChange,
    MetricChange,
    answers_verdict,
    describe_faults,
    fault_changes,
    metric_changes,
)
from tailora.evaluation.classification import (
    LabelOutputs,
    as_intervals,
    beats_majority,
    describe_labels,
    label_details,
    label_scores,
)
from tailora.evaluation.rewards import NOTHING_TRAINED, describe_rewards, reward_changes, scores_of
from tailora.evaluation.statistics import (
    FEW_EXAMPLES,
    TOO_FEW,
    describe_change,
    describe_preferences,
    mean_interval,
    preference_metrics,
)
from tailora.report.format import plural, share
from tailora.report.run_advice import advice_of, remedy_of
from tailora.study.config import LORA
from tailora.train.answers import ComparedAnswer
from tailora.train.config import NATS_PER_TOKEN
from tailora.train.significance import Change, Finding, Interval, change_of

MOST_CUT = 0.9  # share of truncated completions above which the verdict names their limit
WHEN = ("before", "after")
OTHERS = " that did not choose the step"
UNKNOWN = "Whether training worked is unknown without held-out data: use --eval-data FILE."


@dataclass(frozen=True)
class Effect:
    """What training changed on the held-out examples; empty without any."""

    examples: int = 0
    is_halved: bool = False  # other held-out examples chose the best step
    losses: dict[str, Interval] = field(default_factory=dict)  # "before" and "after"
    change: Change | None = None  # of the loss or the reward
    metrics: dict[str, dict[str, Interval]] = field(default_factory=dict)  # of the task, the same parts -> by name
    labels: dict[str, Any] = field(default_factory=dict)  # `label_details` after training
    text: str = ""  # the effect on the metrics in words
    answers: dict[str, MetricChange] = field(default_factory=dict)  # of metrics of answers
    first_metric: str = ""  # of these, which decides even if it has no scores
    faults: dict[str, FaultChange] = field(default_factory=dict)  # of the answers
    curve: list[tuple[int, float]] = field(default_factory=list)  # step, loss on all held-out examples


@dataclass(frozen=True)
class RunVerdict:
    """Whether training worked. The sentence, the JSON and the exit code all follow from `finding`."""

    text: str
    finding: Finding = "cannot tell"
    remedy: list[str] = field(default_factory=list)  # flags to try after a run that made the model worse


def effect_of(
    header: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    samples: Sequence[ComparedAnswer],
    higher_is_better: Mapping[str, bool],
) -> Effect:
    """samples: the answers of the run. higher_is_better: of each metric of these."""
    if not examples:
        return Effect()
    before, after, tokens = ([row[name] for row in examples] for name in (*WHEN, "tokens"))
    losses = {"before": mean_interval(before, tokens), "after": mean_interval(after, tokens)}
    effect = Effect(
        len(examples),
        "chose" in examples[0],
        losses,
        change_of(before, after, tokens, higher_is_better=False),
        answers=metric_changes(samples, higher_is_better),
        first_metric=next(iter(higher_is_better), ""),
        faults={} if header.get("rewards") else fault_changes(samples),
    )
    if header.get("labels"):
        outputs = [LabelOutputs.of_rows(Labels.from_dict(header["labels"]), examples, when) for when in WHEN]
        metrics = {when: as_intervals(label_scores(data)) for when, data in zip(WHEN, outputs, strict=True)}
        labels = label_details(outputs[1])
        text = describe_labels(metrics["before"], metrics["after"], labels, new_head=header["labels"]["new_head"])
        return replace(effect, metrics=metrics, labels=labels, text=text)
    if rewards := header.get("rewards"):
        changes = reward_changes(*(scores_of(examples, when) for when in WHEN))
        metrics = {part: {name: getattr(change, part) for name, change in changes.items()} for part in WHEN}
        metrics["change"] = {name: change.change.interval for name, change in changes.items()}
        prompts = plural(len(examples), "held-out prompt") + OTHERS * effect.is_halved
        text = describe_rewards(changes, rewards["trained"], rewards["judges"], prompts)
        text += f" {TOO_FEW}" * (len(examples) < FEW_EXAMPLES)
        return replace(
            effect, change=changes["reward"].change if "reward" in changes else None, metrics=metrics, text=text
        )
    if all(f"scores_{when}" in examples[0] for when in WHEN):  # a study does not compute the base's again
        metrics = {when: preference_metrics([row[f"scores_{when}"] for row in examples]) for when in WHEN}
        return replace(effect, metrics=metrics, text=describe_preferences(**metrics))
    return effect


def run_verdict(
    header: Mapping[str, Any],
    settings: Mapping[str, Any],
    result: Mapping[str, Any] | None,
    steps: Sequence[Mapping[str, Any]],
    effect: Effect,
) -> RunVerdict:
    losses, after, unit = effect.losses, effect.metrics.get("after", {}), header.get("loss_unit", NATS_PER_TOKEN)
    if result is None:
        return RunVerdict("The run has not finished: it was interrupted, failed, or is still running.")
    if header.get("rewards"):
        return _reward_verdict(settings, result, steps, effect)
    if not losses and result["eval_loss_after"] is None:
        return RunVerdict(UNKNOWN)
    if not losses or effect.change is None:
        change = f"{result['eval_loss_before']:.3f} to {result['eval_loss_after']:.3f}"
        return RunVerdict(f"Held-out loss went from {change} {unit}; its interval was not recorded.")
    where = plural(effect.examples, "held-out example") + OTHERS * effect.is_halved
    of_loss = describe_change(effect.change, where, unit) + _on_choice(settings, result, effect)
    of_loss += f" {TOO_FEW}" * (effect.examples < FEW_EXAMPLES)
    is_unknown = bool(settings.get("metric")) and effect.first_metric not in effect.answers
    asked = max((metric.answers for metric in effect.answers.values()), default=0)
    prompts = plural(asked, "held-out prompt") + OTHERS * effect.is_halved
    finding, of_answers = answers_verdict(effect.answers, effect.faults, effect.change.finding, prompts)
    if is_unknown:
        missing = f"by {effect.first_metric}" if effect.answers else "by the metrics"
        finding, of_answers = "cannot tell", f"Cannot tell: the answers have no scores {missing}."
    is_better = not effect.labels or beats_majority(after["accuracy"].value, effect.labels)
    of_task = [of_loss, effect.text] if is_better else [effect.text, of_loss]
    text = " ".join(filter(None, [of_answers, *of_task, describe_faults(effect.faults)]))
    step_losses = [step["loss"] for step in steps]
    if finding != "worse":
        advice = ""
        if effect.change.finding == "better" and unit == NATS_PER_TOKEN and settings.get("method", LORA) == LORA:
            advice, _ = advice_of(settings, step_losses, effect.curve, effect.examples)
        return RunVerdict(f"{text} {advice}".strip(), finding)
    cause, remedy = remedy_of(settings, step_losses)
    return RunVerdict(f"{'' if of_answers else 'Worse than before training. '}{text} {cause}", finding, remedy)


def _on_choice(settings: Mapping[str, Any], result: Mapping[str, Any], effect: Effect) -> str:
    """Returns a sentence if the examples that evaluate the run also chose its step among several."""
    is_chosen = 0 < (settings.get("eval_steps") or 0) < result.get("steps", 0)
    return " The same examples chose the step, so this looks too good." * (is_chosen and not effect.is_halved)


def _reward_verdict(
    settings: Mapping[str, Any], result: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], effect: Effect
) -> RunVerdict:
    after, all_equal = effect.metrics.get("after", {}), not settings.get("beta")
    all_equal = all_equal and all(step["equal_groups"] == 1 for step in steps)
    cut = after["truncated"].value if after else 0.0
    too_long = f" {share(cut, 1)} of the completions reached --max-completion-length; raise it."
    text = (
        NOTHING_TRAINED if all_equal else effect.text + _on_choice(settings, result, effect) if effect.text else UNKNOWN
    )
    finding: Finding = "cannot tell" if effect.change is None else effect.change.finding
    return RunVerdict(text + too_long * (cut > MOST_CUT), finding)
