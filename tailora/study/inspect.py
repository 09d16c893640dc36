"""What an adapter has learned, where, and what follows: its singular values, beside the base's weights and on data.

files -> updates -> modules                     ranks, energy, learned scales
with the base's weights                         relative norms, intruder dimensions
with held-out data                              what the smaller singular values are worth; forgetting
-> rules -> advice
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tailora.core.adapter import Adapter
from tailora.core.compress import Spectra, leading_only, spectra_of
from tailora.core.low_rank import product_spectrum
from tailora.errors import ConfigError, listing
from tailora.evaluation.forgetting import forgetting, own_texts, texts_of
from tailora.evaluation.scores import held_out
from tailora.evaluation.spectral import (
    ModuleReport,
    Update,
    chance_overlap,
    directions,
    examine,
    inner,
    subspace_overlap,
    updates_alone,
    updates_of,
    with_shares,
)
from tailora.evaluation.statistics import Interval, paired_difference
from tailora.formats.offline import read_alone
from tailora.formats.run_folder import adapter_in, recorded_settings
from tailora.model import LoRAModel
from tailora.study.advice import Advice, advise, costly, forgets_much
from tailora.study.model_layout import group_of, grouped, in_order, layers_of
from tailora.train.config import TrainConfig
from tailora.train.loss import Evaluation
from tailora.train.model_loading import load_base

if TYPE_CHECKING:
    from tailora.model import LoRAModel
    from tailora.train.loss import Evaluation


# ---- Two adapters of one base: do they change the same directions, and what do they lose when they are added up?


@dataclass(frozen=True)
class Overlap:
    """One matrix that both adapt. Norms are those of the updates, s (B A - B0 A0).

    writes, reads: overlap of the spaces of their outputs and of their inputs (`evaluation.spectra.subspace_overlap`),
        each beside that of random spaces of these sizes.
    cosine: <dW1, dW2> / (||dW1|| ||dW2||): 1 where they say the same, 0 where they do not meet, -1 where they cancel.
    sum_norm: ||dW1 + dW2||.
    """

    path: str
    norm: float
    other_norm: float
    sum_norm: float
    cosine: float
    writes: float
    writes_by_chance: float
    reads: float
    reads_by_chance: float


@dataclass(frozen=True)
class Together:
    """Held-out losses, nats per supervised token. worse: of both - of the better one, with its 95% interval."""

    base: float
    one: float
    other: float
    both: float
    worse: float
    worse_low: float | None
    worse_high: float | None


@dataclass(frozen=True)
class Pair:
    """modules: of both.    cosine: of the updates of all of them together."""

    other: str
    modules: list[Overlap]
    only_here: list[str]
    only_there: list[str]
    cosine: float
    losses: Together | None = None


def overlaps(other: str, here: Mapping[str, Update], there: Mapping[str, Update]) -> Pair:
    """Raises ConfigError where the same path has different shapes, as adapters of different models have."""
    shared = in_order(here.keys() & there.keys())
    _check_shapes(other, {path: (_shape(here[path]), _shape(there[path])) for path in shared})
    found = [_overlap(here[path], there[path]) for path in shared]
    products = sum(each.cosine * each.norm * each.other_norm for each in found)
    lengths = [math.sqrt(sum(length**2 for length in lengths)) for lengths in _lengths(found)]
    cosine = products / math.prod(lengths) if all(lengths) else 0.0
    return Pair(other, found, in_order(here.keys() - there.keys()), in_order(there.keys() - here.keys()), cosine)


def _lengths(found: list[Overlap]) -> tuple[list[float], list[float]]:
    return [each.norm for each in found], [each.other_norm for each in found]


def _shape(update: Update) -> tuple[int, int, int]:
    """(groups, m, n)."""
    return len(update.factors.B), update.factors.B.shape[1], update.factors.A.shape[2]


def _check_shapes(other: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    wrong = [f"{path}: {one} here, {two} there" for path, (one, two) in shapes.items() if one != two]
    if wrong:
        shown = [*wrong[:5], *([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])]
        raise ConfigError(f"{other} was made for another model; shapes (groups, out, in) differ: {listing(shown)}")


def _overlap(one: Update, two: Update) -> Overlap:
    first, second = product_spectrum(one.factors), product_spectrum(two.factors)
    norms, product = (float(first.S.norm()), float(second.S.norm())), inner(one.factors, two.factors)
    (writes, reads), (other_writes, other_reads) = directions(first), directions(second)
    return Overlap(
        path=one.path,
        norm=norms[0],
        other_norm=norms[1],
        sum_norm=math.sqrt(max(norms[0] ** 2 + norms[1] ** 2 + 2 * product, 0.0)),
        cosine=product / math.prod(norms) if all(norms) else 0.0,
        writes=subspace_overlap(writes, other_writes),
        writes_by_chance=chance_overlap(writes, other_writes),
        reads=subspace_overlap(reads, other_reads),
        reads_by_chance=chance_overlap(reads, other_reads),
    )


def together(model: LoRAModel, names: tuple[str, str], measure: Callable[[], Evaluation]) -> Together:
    """Losses with either adapter and with both; afterwards what was active is active again."""
    active = model.active_adapters
    found: list[Evaluation] = []
    try:
        for chosen in (None, names[0], names[1], names):
            model.set_adapter(chosen)
            found.append(measure())
    finally:
        model.set_adapter(active)
    base, one, other, both = found
    better = min(one, other, key=lambda each: each.loss)
    worse = paired_difference(better.sums, both.sums, both.counts)
    low, high = (None if math.isnan(end) else end for end in worse[1:])
    return Together(base.loss, one.loss, other.loss, both.loss, worse.value, low, high)


# ----


NAME = "default"
RECORDED = ("model", "data", "learning_rate", "num_train_epochs", "max_steps", "seed")

Say = Callable[[str], None]
Progress = Callable[[int, int], None]  # module, of modules


@dataclass(frozen=True)
class Inspection:
    """layers: of the model as far as the adapter names them.    left_out: what is no update, and why.
    training: what the run beside the adapter recorded of its settings, {} without one.
    forgetting: KL from the base and loss on other text (`measure.forgetting`).    dial: measured where a rule asked.
    pair: beside another adapter.
    """

    adapter: str
    model: str | None
    named_base: str | None
    base_dtype: str | None
    config: dict[str, Any]
    training: dict[str, Any]
    layers: int
    modules: list[ModuleReport]
    left_out: dict[str, str]
    held_out: HeldOut | None = None
    forgetting: dict[str, Any] | None = None
    dial: list[Dial] = field(default_factory=list)
    pair: Pair | None = None
    advice: list[Advice] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `group` and `use` (effective rank / rank) of every module with them."""
        content = asdict(self)
        for values, module in zip(content["modules"], self.modules, strict=True):
            values |= {"group": group_of(module.path, self.layers), "use": module.use}
        return content


@dataclass(frozen=True)
class Asked:
    """What else is measured where there is a model. Paths and names are those of the command line.

    data: held-out data, or 'demo'.    field, max_length: as in training.
    forgetting_data: texts of other tasks; without it what the base writes by itself.
    intruders: whether they are counted, by far the slowest part.    seed: of the random updates and of the texts.
    """

    data: str | None = None
    field: dict[str, str] = field(default_factory=dict)
    max_length: int = 1024
    forgetting_data: str | None = None
    intruders: bool = True
    seed: int = 0


def inspect(
    adapter: str | Path,
    model: str | None = None,
    data: str | None = None,
    *,
    other: str | Path | None = None,
    asked: Asked | None = None,
    quantize: str | None = None,
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Inspection:
    """Look at an adapter's files, beside the base `model` (folder, Hub id, 'demo') and on held-out `data` where given.

    adapter: a folder of tailora, PEFT or mlx-lm, a run's folder, or with `model` any file that `load_adapter` reads.
    other: a second one for the same base, to be compared with.
    Nothing is written and nothing is trained. Raises ConfigError, FormatError, BaseMismatchError, DataError.
    """
    asked = replace(asked or Asked(), data=data)
    folder, second = adapter_in(Path(adapter)), None if other is None else adapter_in(Path(other))
    if model is None:
        return _alone(folder, second, asked)
    # DROPPED  # transformers from here on

    found = loaded(folder, second, model, asked, quantize, say, progress)
    found = replace(found, adapter=str(folder), model=model, training=_training(folder))
    return replace(found, advice=advise(found))


def _alone(folder: Path, other: Path | None, asked: Asked) -> Inspection:
    started = time.perf_counter()
    alone = read_alone(folder)
    if asked.data is not None:
        named = f", such as {alone.base}, which the adapter names" if alone.base else ""
        raise ConfigError(f"data {asked.data!r} needs a model to be read by: give --model{named}")
    updates = updates_alone(alone)
    found = Inspection(
        adapter=str(folder),
        model=None,
        named_base=alone.base,
        base_dtype=None,
        config=alone.config.model_dump(),
        training=_training(folder),
        layers=layers_of(updates),
        modules=examined(updates, asked, lambda *_: None),
        left_out=alone.left_out,
        pair=None if other is None else overlaps(str(other), updates, updates_alone(read_alone(other))),
    )
    return replace(found, advice=advise(found), seconds=time.perf_counter() - started)


def examined(updates: Mapping[str, Update], asked: Asked, progress: Progress) -> list[ModuleReport]:
    """In the order of the layers."""
    reports = []
    for number, path in enumerate(in_order(updates), 1):
        reports.append(examine(updates[path], seed=asked.seed + number, look_for_intruders=asked.intruders))
        progress(number, len(updates))
    return with_shares(reports)


def _training(folder: Path) -> dict[str, Any]:
    settings = recorded_settings(folder)
    return {name: settings[name] for name in RECORDED if settings.get(name) is not None}


# ---- What an adapter's smaller singular values are worth, in held-out loss; and what it costs at a lower strength.


STRENGTHS = (0.75, 0.5, 0.25)  # of the dial, tried where much is forgotten

Measure = Callable[[], Evaluation]


@dataclass(frozen=True)
class Rise:
    """What held-out loss does without the lower half of some singular values, in nats per token, paired by example.

    cost: of the improvement over the base, what goes; None where there was none.
    values: share of the adapter's singular values that these modules have.
    """

    loss: float
    rise: float
    low: float | None
    high: float | None
    cost: float | None
    values: float


@dataclass(frozen=True)
class HeldOut:
    """Losses in nats per supervised token. `improvement` is base - adapter, with its 95% interval."""

    data: str
    examples: int
    tokens: int
    base_loss: float
    loss: float
    improvement: float
    improvement_low: float | None
    improvement_high: float | None
    half: Rise
    groups: dict[str, Rise]


@dataclass(frozen=True)
class Dial:
    """The adapter at a lower strength: held-out loss (None without data), and what it forgets then."""

    strength: float
    loss: float | None
    kl: float
    base_text_rise: float


def tails(
    model: LoRAModel,
    name: str,
    spectra: Spectra,
    groups: Mapping[str, Sequence[str]],
    data: str,
    measure: Measure,
    say: Say,
) -> HeldOut:
    """The base, the adapter, and the adapter without the lower half of its singular values: of all modules, and where
    that costs more than the limit (`ranks.costly`) of each group.
    """
    adapter = model.adapter(name)
    with model.disable_adapter():
        base = measure()
    say(f"held-out loss of the base {base.loss:.4f}")
    whole = measure()
    say(f"with the adapter {whole.loss:.4f}")
    gained = paired_difference(whole.sums, base.sums, base.counts)

    def without(what: str, paths: Sequence[str]) -> Rise:
        with leading_only(adapter, spectra, {path: upper_half(adapter, spectra, path) for path in paths}):
            found = measure()
        say(f"without the lower half of the singular values in {what} {found.loss:.4f}")
        rise = paired_difference(whole.sums, found.sums, whole.counts)
        return _rise(found.loss, rise, gained.value, _count(spectra, paths) / _count(spectra, list(spectra)))

    half = without("all modules", list(spectra))
    asked = groups if len(groups) > 1 and costly(half) else {}
    by_group = {group: without(group, paths) for group, paths in asked.items()}
    return HeldOut(
        data,
        len(whole.counts),
        int(whole.counts.sum()),
        base.loss,
        whole.loss,
        *_ends(gained),
        half=half,
        groups=by_group,
    )


def _rise(loss: float, rise: Interval, gained: float, values: float) -> Rise:
    return Rise(loss, *_ends(rise), cost=rise.value / gained if gained > 0 else None, values=values)


def _ends(interval: Interval) -> tuple[float, float | None, float | None]:
    low, high = (None if math.isnan(end) else end for end in interval[1:])
    return interval.value, low, high


def upper_half(adapter: Adapter, spectra: Spectra, path: str) -> int:
    """How many values are kept, per group: half, rounded up; with a frozen start half of 2r."""
    return min(-(-spectra[path].S.shape[1] // 2), adapter.low_rank[path].lora_B.shape[1])


def _count(spectra: Spectra, paths: Sequence[str]) -> int:
    return sum(spectra[path].S.numel() for path in paths)


def dialled(model: LoRAModel, name: str, texts: list[list[int]], measure: Measure | None, say: Say) -> list[Dial]:
    """The adapter at lower strengths than it has; afterwards at that."""
    found, before = [], next(layer.strength.item() for layer in model.adapter(name).low_rank.values())
    try:
        for strength in STRENGTHS:
            model.set_scale(name, strength * before)
            lost, loss = forgetting(model, texts), None if measure is None else measure().loss
            found.append(Dial(strength, loss, lost.kl, lost.loss_after - lost.loss_before))
            say(
                f"at strength {strength}: KL from the base {lost.kl:.4f}"
                + ("" if loss is None else f", loss {loss:.4f}")
            )
    finally:
        model.set_scale(name, before)
    return found


# ---- The same looks at an adapter within its model: beside the base's weights, and on data.


OTHER = "other"


def loaded(
    folder: Path,
    other: Path | None,
    model: str,
    asked: Asked,
    quantize: str | None,
    say: Say,
    progress: Progress,
) -> Inspection:
    """Of adapters' folders within a base that is loaded for them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base(
        model, "stored" if asked.data is asked.forgetting_data is None else "auto", device, quantize
    )
    adapted = LoRAModel.from_pretrained(base, folder, NAME)
    if other is not None:
        adapted.load_adapter(other, OTHER)
    adapted.to(device).eval()
    beside = None if other is None else OTHER
    found = inspect_model(adapted, NAME, asked, other=beside, tokenizer=tokenizer, say=say, progress=progress)
    return found if found.pair is None else replace(found, pair=replace(found.pair, other=str(other)))


def inspect_model(
    model: LoRAModel,
    name: str = NAME,
    asked: Asked | None = None,
    *,
    other: str | None = None,
    tokenizer: Any = None,
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Inspection:
    """An adapter of a model in memory, which is left as it is. other: another one of its adapters, to be
    compared with. tokenizer: where `asked` has data.

    Raises AdapterError, ConfigError, DataError.
    """
    started = time.perf_counter()
    asked = asked or Asked()
    on_data = asked.data is not None or asked.forgetting_data is not None
    if on_data and tokenizer is None:
        raise ConfigError(f"{asked.data or asked.forgetting_data} needs the model's tokenizer: give tokenizer")
    adapter = model.adapter(name)
    updates, left_out = updates_of(adapter, model.base_model)
    config = getattr(model.base_model, "config", None)
    weights = [parameter.dtype for parameter in model.base_model.parameters() if parameter.is_floating_point()]
    found = Inspection(
        adapter=name,
        model=getattr(config, "name_or_path", None),
        named_base=None,
        base_dtype=str(weights[0]).removeprefix("torch.") if weights else None,
        config=adapter.config.model_dump(),
        training={},
        layers=getattr(config, "num_hidden_layers", None) or layers_of(updates),
        modules=examined(updates, asked, progress),
        left_out=left_out,
        pair=None if other is None else overlaps(other, updates, updates_of(model.adapter(other), model.base_model)[0]),
    )
    if on_data:
        active = model.active_adapters
        model.set_adapter(name)
        try:
            found = _measured(found, model, name, asked, tokenizer, say)
        finally:
            model.set_adapter(active)
    return replace(found, advice=advise(found), seconds=time.perf_counter() - started)


def _measured(found: Inspection, model: LoRAModel, name: str, asked: Asked, tokenizer: Any, say: Say) -> Inspection:
    """With what takes data: losses, forgetting, and what a rule asks for."""
    measure = None if asked.data is None else _judge(found, model, asked, tokenizer, say)
    if measure is not None:
        found = _with_losses(found, model, name, str(asked.data), measure, say)
    texts, where = _texts(model, tokenizer, asked)
    lost = forgetting(model, texts)
    say(f"KL from the base on {where} {lost.kl:.4f}")
    found = replace(found, forgetting={**asdict(lost), "text": where})
    return replace(found, dial=dialled(model, name, texts, measure, say)) if forgets_much(found) else found


def _judge(found: Inspection, model: LoRAModel, asked: Asked, tokenizer: Any, say: Say) -> Measure:
    settings = {"model": found.model or NAME, "data": asked.data, "field": asked.field, "max_length": asked.max_length}
    return held_out(TrainConfig(**settings), model, tokenizer, say)


def _with_losses(found: Inspection, model: LoRAModel, name: str, data: str, measure: Measure, say: Say) -> Inspection:
    adapter = model.adapter(name)
    whole = {module.path: adapter.low_rank[module.path] for module in found.modules}
    spectra = spectra_of(replace(adapter, low_rank=whole))
    found = replace(
        found, held_out=tails(model, name, spectra, grouped(list(spectra), found.layers), data, measure, say)
    )
    if found.pair is None:
        return found
    both = together(model, (name, found.pair.other), measure)
    say(f"with {found.pair.other} alone {both.other:.4f}, with both {both.both:.4f}")
    return replace(found, pair=replace(found.pair, losses=both))


def _texts(model: LoRAModel, tokenizer: Any, asked: Asked) -> tuple[list[list[int]], str]:
    if asked.forgetting_data is not None:
        return texts_of(asked.forgetting_data, model, tokenizer), asked.forgetting_data
    return own_texts(model, tokenizer, seed=asked.seed), "text that the base writes"
