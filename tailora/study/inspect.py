"""Inspects an adapter: its singular values, how they compare with the base's weights, and what they do on data.

    inspect                   an adapter's files alone (ranks, energy, learned scales), or loaded with its base model
      inspect_model             in a model: also relative norms and intruder dimensions
        _measure_on_data          with data: losses without the lower half of the singular values, forgetting
      adapter_overlap           beside a second adapter: do both change the same directions?
    study/advice.py           the data classes of the results, and the rules that turn them into advice

Nothing is trained, and the adapter is not changed.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tailora.core.compress import leading_only, spectra_of
from tailora.core.device import choose_device
from tailora.core.low_rank import Update, product_spectrum
from tailora.errors import ConfigError, listing
from tailora.evaluation import spectral
from tailora.evaluation.forgetting import forgetting, read_texts, sample_texts
from tailora.evaluation.generate import is_seq2seq
from tailora.evaluation.scores import loss_on_data
from tailora.evaluation.spectral import ModuleReport
from tailora.evaluation.statistics import Interval, paired_difference
from tailora.formats.hub import name_of_model
from tailora.formats.offline import read_offline
from tailora.formats.run_folder import adapter_folder, recorded_settings
from tailora.model import LoRAModel
from tailora.study.advice import (
    AdapterOverlap,
    CombinedLosses,
    HeldOutLosses,
    Inspection,
    ModuleOverlap,
    ReducedStrength,
    TruncationCost,
    advise,
)
from tailora.study.model_layout import by_group, in_order, layer_count
from tailora.train.config import TrainConfig
from tailora.train.loss import Evaluation
from tailora.train.model_loading import labels_of_adapter, load_base, task_of_adapter

NAME, OTHER = "default", "other"  # of the two adapters in a model that is loaded for them
RECORDED = ("model", "data", "learning_rate", "num_train_epochs", "max_steps", "seed")
STRENGTHS = (0.75, 0.5, 0.25)  # tried if the adapter forgets much

Log = Callable[[str], None]
Progress = Callable[[int, int], None]  # module, of modules
Evaluate = Callable[[], Evaluation]  # the held-out losses of a model as it is now


@dataclass(frozen=True)
class InspectOptions:
    """What is measured with a model, in addition. Paths and names are those of the command line.

    data: held-out data, or 'demo'.    field, max_length, system: as in training.
    forgetting_data: texts of other tasks; by default texts that the base itself writes.
    intruders: whether intruder dimensions are counted, by far the slowest part.
    seed: of the random updates that they are compared with, and of the texts.
    """

    data: str | None = None
    field: dict[str, str] = field(default_factory=dict)
    max_length: int = 1024
    forgetting_data: str | None = None
    intruders: bool = True
    seed: int = 0
    system: str | None = None

    @property
    def uses_data(self) -> bool:
        return self.data is not None or self.forgetting_data is not None


def inspect(
    adapter: str | Path,
    model: str | None = None,
    data: str | None = None,
    *,
    other: str | Path | None = None,
    options: InspectOptions | None = None,
    quantize: str | None = None,
    device: torch.device | str | None = None,
    log: Log = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Inspection:
    """Inspects an adapter's files, and with `model` (folder, Hub id, 'demo') the adapter in its base, with `data` its
    held-out losses.

    adapter: a folder of tailora, PEFT or mlx-lm, a run's folder, or with `model` any file that `load_adapter` reads.
    other: a second adapter of the same base to compare with.
    device: of the model; by default a GPU if there is one.

    Nothing is written. Raises ConfigError, FormatError, BaseMismatchError, DataError.
    """
    started = time.perf_counter()
    options = replace(options or InspectOptions(), data=data)
    folder, other_folder = adapter_folder(Path(adapter)), None if other is None else adapter_folder(Path(other))
    if model is None:  # the files alone
        content = read_offline(folder)
        named_base = None if content.base is None else name_of_model(content.base)
        if data is not None:
            base = f", such as {named_base}, which the adapter names" if named_base else ""
            raise ConfigError(f"data {data!r} needs a model to be read by: give --model{base}")
        updates, pair = content.updates, None
        if other_folder is not None:
            pair = adapter_overlap(str(other_folder), updates, read_offline(other_folder).updates)
        inspection = Inspection(
            adapter=str(folder),
            named_base=named_base,
            config=content.config.model_dump(),
            layers=layer_count(updates),
            modules=_module_reports(updates, options, lambda *_: None),
            left_out=content.left_out,
            pair=pair,
            seconds=time.perf_counter() - started,
        )
    else:
        labels = labels_of_adapter(folder)
        if labels is not None and options.uses_data:
            raise ConfigError(
                f"{folder} was trained for {labels.task}, and on data the loss and the forgetting of language models "
                "are measured: leave --data and --forgetting-data out; `tailora eval` shows how good its labels are"
            )
        device = choose_device() if device is None else torch.device(device)
        precision = "auto" if options.uses_data else "stored"
        task = task_of_adapter(folder)
        loaded, tokenizer = load_base(model, precision, device, quantize, task=task, labels=labels)
        adapted = LoRAModel.from_pretrained(loaded, folder, NAME)
        if other_folder is not None:
            adapted.load_adapter(other_folder, OTHER)
        adapted.eval()
        second = None if other_folder is None else OTHER
        inspection = inspect_model(
            adapted, NAME, options, other=second, tokenizer=tokenizer, log=log, progress=progress
        )
        if inspection.pair is not None:
            inspection = replace(inspection, pair=replace(inspection.pair, other=str(other_folder)))
    settings = recorded_settings(folder)
    training = {name: settings[name] for name in RECORDED if settings.get(name) is not None}
    inspection = replace(inspection, adapter=str(folder), model=model, training=training)
    return replace(inspection, advice=advise(inspection))


def _module_reports(updates: Mapping[str, Update], options: InspectOptions, progress: Progress) -> list[ModuleReport]:
    """In the order of the layers."""
    reports = []
    for number, path in enumerate(in_order(updates), 1):
        reports.append(
            spectral.module_report(updates[path], seed=options.seed + number, count_intruders=options.intruders)
        )
        progress(number, len(updates))
    return spectral.with_energy(reports)


def inspect_model(
    model: LoRAModel,
    name: str = NAME,
    options: InspectOptions | None = None,
    *,
    other: str | None = None,
    tokenizer: Any = None,
    log: Log = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Inspection:
    """Inspects an adapter of a model in memory, and leaves the model as it was.

    other: a second adapter of the model to compare with.    tokenizer: needed where `options` names data.

    Raises AdapterError, ConfigError, DataError.
    """
    started = time.perf_counter()
    options = options or InspectOptions()
    if options.uses_data and tokenizer is None:
        raise ConfigError(f"{options.data or options.forgetting_data} needs the model's tokenizer: give tokenizer")
    if options.forgetting_data is not None and is_seq2seq(model):
        raise ConfigError(
            f"forgetting data {options.forgetting_data!r}: forgetting is measured on text that goes on, and this model "
            "has an encoder: leave it out"
        )
    adapter = model.adapter(name)
    updates, left_out = spectral.updates_of(adapter, model.base_model)
    overlap = None
    if other is not None:
        overlap = adapter_overlap(other, updates, spectral.updates_of(model.adapter(other), model.base_model)[0])
    config = getattr(model.base_model, "config", None)
    weights = [parameter.dtype for parameter in model.base_model.parameters() if parameter.is_floating_point()]
    inspection = Inspection(
        adapter=name,
        model=getattr(config, "name_or_path", None),
        base_dtype=str(weights[0]).removeprefix("torch.") if weights else None,
        config=adapter.config.model_dump(),
        layers=getattr(config, "num_hidden_layers", None) or layer_count(updates),
        modules=_module_reports(updates, options, progress),
        left_out=left_out,
        pair=overlap,
    )
    if options.uses_data:
        active = model.active_adapters
        model.set_adapter(name)
        try:
            inspection = _measure_on_data(inspection, model, name, options, tokenizer, log)
        finally:
            model.set_adapter(active)
    return replace(inspection, advice=advise(inspection), seconds=time.perf_counter() - started)


# ---- On data


def _measure_on_data(
    inspection: Inspection, model: LoRAModel, name: str, options: InspectOptions, tokenizer: Any, log: Log
) -> Inspection:
    """Adds held-out losses and, of a language model, forgetting, and if much is forgotten, both at lower strengths."""
    evaluate, pair = None, inspection.pair
    if options.data is not None:
        settings = {"model": inspection.model or NAME, "data": options.data}
        config = TrainConfig(**settings, field=options.field, system=options.system, max_length=options.max_length)
        evaluate = loss_on_data(config, model, tokenizer, log)
        inspection = replace(
            inspection, held_out=_held_out_losses(inspection, model, name, options.data, evaluate, log)
        )
        if pair is not None:
            combined = _combined_losses(model, (name, pair.other), evaluate)
            log(f"with {pair.other} alone {combined.other:.4f}, with both {combined.both:.4f}")
            inspection = replace(inspection, pair=replace(pair, losses=combined))
    if is_seq2seq(model):  # forgetting is measured on text that goes on, which such a model does not write
        return inspection
    if options.forgetting_data is not None:
        texts, source = read_texts(options.forgetting_data, model, tokenizer), options.forgetting_data
    else:
        texts, source = sample_texts(model, tokenizer, seed=options.seed), "text that the base writes"
    forgotten = forgetting(model, texts)
    log(f"KL from the base on {source} {forgotten.kl:.4f}")
    inspection = replace(inspection, forgetting={**asdict(forgotten), "text": source})
    if not inspection.forgets_much:
        return inspection
    return replace(inspection, dial=_reduced_strengths(model, name, texts, evaluate, log))


def _held_out_losses(
    inspection: Inspection, model: LoRAModel, name: str, data: str, evaluate: Evaluate, log: Log
) -> HeldOutLosses:
    """The losses of the base, of the adapter, and of the adapter without the lower half of the singular values of all
    modules; where that is costly, of each group of modules, too.
    """
    adapter = model.adapter(name)
    spectra = spectra_of(
        replace(adapter, low_rank={module.path: adapter.low_rank[module.path] for module in inspection.modules})
    )
    with model.disable_adapter():
        base = evaluate()
    log(f"held-out loss of the base {base.loss:.4f}")
    tuned = evaluate()
    log(f"with the adapter {tuned.loss:.4f}")
    gain = paired_difference(tuned.sums, base.sums, base.counts)

    def without_lower_half(group: str, paths: Sequence[str]) -> TruncationCost:
        # Of each matrix's singular values half are kept, rounded up; of 2r with a frozen initialisation.
        ranks = {path: min(-(-spectra[path].S.shape[1] // 2), adapter.low_rank[path].lora_B.shape[1]) for path in paths}
        with leading_only(adapter, spectra, ranks):
            truncated = evaluate()
        log(f"without the lower half of the singular values in {group} {truncated.loss:.4f}")
        rise = paired_difference(tuned.sums, truncated.sums, tuned.counts)
        values = sum(spectra[path].S.numel() for path in paths)
        return TruncationCost(
            truncated.loss,
            *_with_ends(rise),
            cost=rise.value / gain.value if gain.value > 0 else None,
            values=values / sum(spectrum.S.numel() for spectrum in spectra.values()),
        )

    half = without_lower_half("all modules", list(spectra))
    groups = by_group(list(spectra), inspection.layers)
    measured = groups if len(groups) > 1 and half.is_costly else {}
    return HeldOutLosses(
        data,
        len(tuned.counts),
        int(tuned.counts.sum()),
        base.loss,
        tuned.loss,
        *_with_ends(gain),
        half=half,
        groups={group: without_lower_half(group, paths) for group, paths in measured.items()},
    )


def _with_ends(interval: Interval) -> tuple[float, float | None, float | None]:
    """Returns value, low and high end; None for an end that is NaN, which JSON lacks."""
    low, high = (None if math.isnan(end) else end for end in interval[1:])
    return interval.value, low, high


def _reduced_strengths(
    model: LoRAModel, name: str, texts: list[list[int]], evaluate: Evaluate | None, log: Log
) -> list[ReducedStrength]:
    """Returns the adapter's losses at each of STRENGTHS times its strength, which is restored afterwards."""
    results, before = [], next(layer.strength for layer in model.adapter(name).low_rank.values())
    try:
        for strength in STRENGTHS:
            model.set_scale(name, strength * before)
            forgotten, loss = forgetting(model, texts), None if evaluate is None else evaluate().loss
            rise = forgotten.loss_after - forgotten.loss_before
            results.append(ReducedStrength(strength, loss, forgotten.kl, rise))
            held_out_loss = "" if loss is None else f", loss {loss:.4f}"
            log(f"at strength {strength}: KL from the base {forgotten.kl:.4f}{held_out_loss}")
    finally:
        model.set_scale(name, before)
    return results


# ---- Beside a second adapter of the same base


def adapter_overlap(other: str, here: Mapping[str, Update], there: Mapping[str, Update]) -> AdapterOverlap:
    """Returns how much the updates `here` and `there` overlap. other: name of the second adapter, of `there`.

    Raises ConfigError if the same path has different shapes, as in adapters of different models.
    """
    shared = in_order(here.keys() & there.keys())
    shapes = {path: (_shape(here[path]), _shape(there[path])) for path in shared}
    if wrong := [f"{path}: {ours} here, {theirs} there" for path, (ours, theirs) in shapes.items() if ours != theirs]:
        problems = listing(wrong, most=5)
        raise ConfigError(f"{other} was made for another model; shapes (groups, out, in) differ: {problems}")
    modules = [_module_overlap(here[path], there[path]) for path in shared]
    product = sum(module.cosine * module.norm * module.other_norm for module in modules)
    norm = math.hypot(*(module.norm for module in modules))
    other_norm = math.hypot(*(module.other_norm for module in modules))
    return AdapterOverlap(
        other=other,
        modules=modules,
        only_here=in_order(here.keys() - there.keys()),
        only_there=in_order(there.keys() - here.keys()),
        cosine=product / (norm * other_norm) if norm and other_norm else 0.0,
    )


def _shape(update: Update) -> tuple[int, int, int]:
    """(groups, out, in)"""
    return len(update.factors.B), update.factors.B.shape[1], update.factors.A.shape[2]


def _module_overlap(here: Update, there: Update) -> ModuleOverlap:
    spectrum, other_spectrum = product_spectrum(here.factors), product_spectrum(there.factors)
    norm, other_norm = float(spectrum.S.norm()), float(other_spectrum.S.norm())
    product = spectral.inner_product(here.factors, there.factors)
    writes, reads = spectral.update_directions(spectrum)
    other_writes, other_reads = spectral.update_directions(other_spectrum)
    return ModuleOverlap(
        path=here.path,
        norm=norm,
        other_norm=other_norm,
        sum_norm=math.sqrt(max(norm**2 + other_norm**2 + 2 * product, 0.0)),
        cosine=product / (norm * other_norm) if norm and other_norm else 0.0,
        writes=spectral.subspace_overlap(writes, other_writes),
        writes_by_chance=spectral.chance_overlap(writes, other_writes),
        reads=spectral.subspace_overlap(reads, other_reads),
        reads_by_chance=spectral.chance_overlap(reads, other_reads),
    )


def _combined_losses(model: LoRAModel, names: tuple[str, str], evaluate: Evaluate) -> CombinedLosses:
    """Returns the losses of the base, of either adapter and of both; restores the active adapters."""
    active = model.active_adapters
    evaluations: list[Evaluation] = []
    try:
        for chosen in (None, names[0], names[1], names):
            model.set_adapter(chosen)
            evaluations.append(evaluate())
    finally:
        model.set_adapter(active)
    base, first, second, both = evaluations
    better = min(first, second, key=lambda evaluation: evaluation.loss)
    worse, low, high = _with_ends(paired_difference(better.sums, both.sums, both.counts))
    return CombinedLosses(base.loss, first.loss, second.loss, both.loss, worse, low, high)
