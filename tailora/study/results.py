"""The results of `compare`, `search`, `rows` and `curve`: data classes whose field names are the keys of report.json.

`comparison_verdict.py`, `rows.py` and `curve.py` fill them in from the runs and add the verdict.
Losses are measured on held-out examples: one half selects settings, the other evaluates the selected ones
(`study/trial.py`). `loss_unit` is their unit. In reinforcement learning, runs minimize minus the reward, and with
--metric, settings are chosen and evaluated by a metric of the answers: report.json and pages then have rewards or
scores instead of losses (`Measure`). Needs no torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tailora.evaluation.statistics import Difference
from tailora.train.config import NATS_PER_TOKEN, REWARD

# ---- Losses or rewards


@dataclass(frozen=True)
class Measure:
    """What runs are compared by: its names, and its sign where it is shown, because all code here minimizes."""

    name: str
    names: str
    better: str
    sign: int
    unit: str
    keys: Mapping[str, str] = field(default_factory=dict)  # of a loss in report.json -> of this

    @property
    def label(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit != self.name else self.name

    def text(self, loss: float) -> str:
        return f"held-out {self.name} {self.sign * loss + 0.0:.4f}"  # never -0

    def difference(self, difference: Difference) -> Difference:
        low, high = sorted((self.sign * difference.low, self.sign * difference.high))
        return replace(difference, value=self.sign * difference.value, low=low, high=high)


KEYS_OF_EXAMPLES = ("eval_loss", "base_loss", "choosing_loss", "seed_losses")
KEYS_OF_RUNS = ("train_losses", "curve")  # remain losses if a metric of the answers compares the runs


def measure_of(loss_unit: str, metric: str = "", *, higher_is_better: bool = True) -> Measure:
    """metric: of the answers; "" if runs are compared by their losses or rewards."""
    if metric:
        keys = {key: key.replace("losses", "scores").replace("loss", "score") for key in KEYS_OF_EXAMPLES}
        better, sign = ("higher", -1) if higher_is_better else ("lower", 1)
        return Measure(metric, f"scores by {metric}", f"{better} {metric}", sign, metric, keys)
    if loss_unit == REWARD:
        both = *KEYS_OF_EXAMPLES, *KEYS_OF_RUNS
        keys = {key: key.replace("losses", "rewards").replace("loss", "reward") for key in both}
        return Measure("reward", "rewards", "higher reward", -1, loss_unit, keys)
    return Measure("loss", "losses", "lower loss", 1, loss_unit)


def converted(content: Any, keys: Mapping[str, str], sign: int) -> Any:
    """Returns the content of a report.json with different keys, and what runs are compared by times `sign`."""
    if isinstance(content, list):
        return [converted(item, keys, sign) for item in content]
    if not isinstance(content, dict):
        return content
    result = {}
    for key, value in content.items():
        if key == "curve":
            value = [(step, sign * loss) for step, loss in value] if key in keys else value
        elif key in keys or key == "rates":
            value = _times(sign, value)
        elif key == "interval" and value is not None:
            value = sorted(sign * end for end in value)
        elif key == "difference" and value is not None and sign < 0:
            low, high = -value["high"], -value["low"]
            value = {**value, "value": -value["value"], "low": low, "high": high}
        elif key not in ("settings", "changes", "further"):  # further numbers keep their sign
            value = converted(value, keys, sign)
        result[keys.get(key, key)] = value
    return result


def _times(sign: int, value: Any) -> Any:
    if isinstance(value, list):
        return [_times(sign, item) for item in value]
    if isinstance(value, dict):
        return {key: _times(sign, item) for key, item in value.items()}
    return None if value is None else sign * value + 0.0  # never -0


@dataclass(frozen=True)
class FurtherResult:
    """A number on the evaluation half by which runs are not compared, over the seeds."""

    value: float
    interval: tuple[float, float]
    difference: Difference | None  # from the reference or the best


def _to_dict(result: "Comparison | SearchResult") -> dict[str, Any]:
    content, measure = asdict(result), result.measure
    return converted(content, measure.keys, measure.sign) if measure.keys else content


# ---- compare


@dataclass(frozen=True)
class ArmResult:
    """One arm of a comparison. If it could not be trained, its outcome is not 'done' and it has no numbers.

    further: by name; accuracy is the share of correct labels, or of correctly ordered pairs of replies.
    """

    name: str
    changes: dict[str, Any]
    outcome: str
    learning_rate: float | None = None
    rates: dict[float, float | None] = field(default_factory=dict)  # -> loss on the selection half; None: failed
    bracketed: bool = False  # whether lower and higher learning rates than the best were tried
    eval_loss: float | None = None
    interval: tuple[float, float] | None = None
    difference: Difference | None = None  # from the reference arm; None for the reference itself
    seconds: float | None = None  # of training, mean over the seeds
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    bytes: int | None = None  # on disk
    forgetting: dict[str, float] | None = None  # mean over the seeds; None if not measured or not finite
    further: dict[str, FurtherResult] = field(default_factory=dict)
    seed_losses: list[float] = field(default_factory=list)  # per seed; eval_loss is their mean
    train_losses: list[list[float]] = field(default_factory=list)  # per seed and step, before the step
    runs: list[str] = field(default_factory=list)  # folders


@dataclass(frozen=True)
class Comparison:
    """p_values: arm -> p value of no difference from the reference, adjusted for the number of arms.
    metric: of the answers, that compares the arms; "" if the loss or the reward does.
    """

    arms: list[ArmResult]
    reference: str
    base_loss: float  # before training, on the evaluation half
    steps: int
    seeds: list[int]
    judged_examples: int
    verdict: str
    p_value: float | None  # of the arm in the verdict
    p_values: dict[str, float]
    notes: list[str]
    settings: dict[str, Any]
    seconds: float
    loss_unit: str = NATS_PER_TOKEN
    metric: str = ""
    higher_is_better: bool = True  # of the metric

    @property
    def measure(self) -> Measure:
        return measure_of(self.loss_unit, self.metric, higher_is_better=self.higher_is_better)

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


# ---- search


@dataclass(frozen=True)
class Candidate:
    """One trial of a search."""

    number: int
    state: str  # done, pruned, diverged, or out of memory
    settings: dict[str, Any]  # the searched ones
    eval_loss: float | None = None  # on the selection half; of a trial that ended early, at its last evaluation
    trainable_parameters: int | None = None
    seconds: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, loss on the selection half)
    message: str = ""  # why the trial ended early


@dataclass(frozen=True)
class Finalist:
    """A trial whose settings were repeated with several seeds and evaluated on the evaluation half."""

    number: int
    settings: dict[str, Any]
    trainable_parameters: int
    choosing_loss: float  # of the trial, on the selection half
    eval_loss: float
    interval: tuple[float, float]
    difference: Difference | None  # from the best; None for the best itself
    p_value: float | None  # of no difference, adjusted for the number of finalists
    seconds: float  # of training, mean over the seeds
    peak_memory_bytes: int
    runs: list[str]  # folders
    further: dict[str, FurtherResult] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """best, cheapest: two of the finalists, which are sorted with the best first.
    metric: as in `Comparison`.
    importances: contribution of each setting to being among the best quarter of the trials (PED-ANOVA); the sum is 1.
    """

    best: Finalist
    cheapest: Finalist
    finalists: list[Finalist]
    trials: list[Candidate]
    importances: dict[str, float]
    verdict: str
    base_loss: float  # before training, on the evaluation half
    steps: int  # of a complete trial
    seeds: list[int]
    judged_examples: int
    notes: list[str]
    settings: dict[str, Any]
    seconds: float  # of all trials and runs, in all processes
    config: str  # path of best.yaml
    loss_unit: str = NATS_PER_TOKEN
    metric: str = ""
    higher_is_better: bool = True  # of the metric

    @property
    def measure(self) -> Measure:
        return measure_of(self.loss_unit, self.metric, higher_is_better=self.higher_is_better)

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


# ---- rows

TEXTS = 200  # rows with the highest scores, which have a text


@dataclass(frozen=True)
class ScoredRow:
    row: int  # number in the file
    file: str
    score: float  # above 0, training on the row raises the held-out loss
    loss: float  # of the finished run on this row, in its unit
    examples: list[int]  # indices of its training examples
    text: str = ""  # of the first `TEXTS` rows, and of the first row of each group in `RowsResult.repeated`


@dataclass(frozen=True)
class RowGroup:
    """Rows that repeat or contradict each other. rows: their locations."""

    rows: list[str]
    text: str  # of the first one


@dataclass(frozen=True)
class RowsResult:
    """The first k rows are called harmful only if they are proven to be."""

    run: str
    rows: list[ScoredRow]  # with the highest scores first
    repeated: dict[str, list[RowGroup]]  # "duplicates", "near_duplicates" and "contradictions" -> groups
    held_out: int  # examples that rows were scored on
    steps: int  # of each run
    loss_unit: str
    verdict: str = ""
    proven: bool = False  # removing the first k rows lowered the held-out loss more than removing random rows
    k: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    variants: list[ArmResult] = field(default_factory=list)  # of a proof; differences are from those without k rows
    seeds: list[int] = field(default_factory=list)
    judged_examples: int = 0
    base_loss: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# ---- curve


@dataclass(frozen=True)
class CurvePoint:
    """Runs on a subset of the data. steps: of each run, the best number."""

    examples: int
    r: int
    steps: int
    eval_loss: float
    seed_losses: list[float]  # eval_loss is their mean


@dataclass(frozen=True)
class LearningCurve:
    """high_rank: loss at the higher rank - at the user's, with all data; None if there was no time for it."""

    points: list[CurvePoint]  # of the user's rank, from the smallest subset to the largest, then of a higher rank
    doublings: list[Difference]  # differences of the loss from each subset to the next
    trend: Difference  # the mean difference per doubling, over all subsets
    quarter: Difference  # loss with a quarter of the data - with all of it
    high_rank: Difference | None
    verdict: str
    base_loss: float  # before training
    steps: int  # the most of a run
    judged_examples: int
    notes: list[str]
    settings: dict[str, Any]
    loss_unit: str = NATS_PER_TOKEN

    @property
    def largest(self) -> CurvePoint:
        """All data used, at the user's rank."""
        return max(self.points, key=lambda point: point.examples)  # the first one

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
