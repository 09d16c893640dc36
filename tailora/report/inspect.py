"""The page of an inspected adapter."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tailora.report import words
from tailora.report.inspected import Advice, Inspection
from tailora.report.layers import maps, spectra
from tailora.report.losses import dial, forgotten, half_losses, half_table
from tailora.report.pair import pair_section
from tailora.report.parts import Finding, Page, Points, Section, Table, Tile

ADAPTER = "adapter"  # within a run's folder


def inspect_page(content: Mapping[str, Any]) -> Page:
    found = Inspection.model_validate(content)
    ranks = sorted({module.r for module in found.modules})
    lead = f"{words.plural(len(found.modules), 'matrix', 'matrices')} adapted, of rank {_range(ranks)}"
    if found.model or found.named_base:
        lead += f", beside {found.model}" if found.model else f", made for {found.named_base}"
    asked = [each.rule for each in found.advice]
    said = f"Rules that ask for something: {', '.join(asked)}." if asked else "No rule asks for a change."
    held = found.held_out
    sections = [
        Section("Advice", "From rules with stated thresholds, each with its numbers.", _advice(found.advice)),
        Section("Where the update is", "A row for each matrix of a layer, a column for each.", maps(found.modules)),
        Section(
            "Spectra",
            "How fast the singular values of each update fall: a flat line uses all of its rank, a steep one little.",
            spectra(found.modules),
        ),
        Section(
            "What the ranks are worth",
            f"Judged on {held.examples:,} held-out examples." if held else "",
            [half_losses(held), half_table(held)] if held else [],
        ),
        Section("What was forgotten", forgotten(found), [dial(found)]),
        *([] if found.pair is None else [pair_section(found.pair)]),
        Section("All numbers", "", [_table(found), *_left_out(found.left_out), _settings(found)]),
    ]
    return Page("inspect", _title(found.adapter), f"{lead}. {said}", _tiles(found), sections)


def _title(adapter: str) -> str:
    """The folder's name; of an adapter within a run's folder, the run's."""
    *_, outer, last = ("", *adapter.replace("\\", "/").rstrip("/").split("/"))
    return outer if last == ADAPTER and outer else last or adapter


def _range(values: Sequence[float]) -> str:
    if not values:
        return "none"
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


def _tiles(found: Inspection) -> list[Tile]:
    if not found.modules:
        return []
    use, stable = (statistics.median(getattr(each, name) for each in found.modules) for name in ("use", "stable_rank"))
    tiles = [
        Tile("effective rank / rank", f"{use:.2f}", "median; 1: all used"),
        Tile("stable rank", f"{stable:.1f}", "median"),
    ]
    norms = [each.relative_norm for each in found.modules if each.relative_norm is not None]
    if norms:
        tiles.append(Tile("‖ΔW‖ / ‖W‖", f"{statistics.median(norms):.2%}", "median"))
    pairs = [
        (each.intruders, each.intruders_random)
        for each in found.modules
        if each.intruders is not None and each.intruders_random is not None
    ]
    if pairs:
        mean, chance = (statistics.fmean(each) for each in zip(*pairs, strict=True))
        tiles.append(Tile("intruders of 10", f"{mean:.1f}", f"{chance:.1f} in a random update"))
    if found.held_out:
        held = found.held_out
        spread = words.between(held.improvement_low, held.improvement_high)
        tiles.append(Tile("better by, nats per token", f"{held.improvement:.3f}", spread))
    if found.forgetting:
        tiles.append(Tile("KL from the base", f"{found.forgetting['kl']:.3f}", "nats per token"))
    return tiles


def _advice(advice: Sequence[Advice]) -> Sequence[Finding | Points]:
    if not advice:
        return [Points(["No rule asks for a change."])]
    return [Finding(each.rule, each.says, "\n".join(filter(None, [_setting(each), each.command]))) for each in advice]


def _setting(advice: Advice) -> str:
    """As YAML, of which JSON is a part."""
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in advice.setting.items())


# ---- two adapters


# ---- all numbers


def _table(found: Inspection) -> Table:
    beside = any(each.relative_norm is not None for each in found.modules)
    new = any(each.intruders is not None for each in found.modules)
    heads = ["module", "r", "effective", "stable", "energy", "scale"]
    heads += ["‖ΔW‖ / ‖W‖"] * beside + ["intruders", "random"] * new
    rows = [
        [
            each.path,
            str(each.r),
            f"{each.effective_rank:.2f}",
            f"{each.stable_rank:.2f}",
            f"{each.energy:.2%}",
            f"{each.scaling:.3g}",
            *(["–" if each.relative_norm is None else f"{each.relative_norm:.2%}"] * beside),
            *([_number(each.intruders), _number(each.intruders_random)] if new else []),
        ]
        for each in found.modules
    ]
    return Table(heads, rows, folded=f"All {words.plural(len(rows), 'matrix', 'matrices')}")


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)


def _left_out(reasons: Mapping[str, str]) -> list[Table]:
    rows = list(reasons.items())
    return [Table(("left out", "why"), rows, words=2, folded="Left out")] if rows else []


def _settings(found: Inspection) -> Table:
    rows = [["adapter", "folder", found.adapter]]
    rows += [["adapter", name, words.value(each)] for name, each in found.config.items()]
    rows += [["its run", name, words.value(each)] for name, each in found.training.items()]
    return Table(("", "setting", "value"), rows, words=3, folded="Settings of the adapter")
