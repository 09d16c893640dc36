"""An adapter to anywhere: write, read back, compare with the live model, and only then give the folder its name.

peft       the folder that tailora, PEFT and most of the ecosystem read
portable   the same for servers that pass over half of its settings (vLLM, SGLang, LMDeploy): portable.py
gguf       llama.cpp and Ollama: gguf.py
mlx        mlx-lm: mlx.py
merged     a Hugging Face folder without an adapter: merged.py
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tailora.core.dequantize import common_dtype
from tailora.errors import ConfigError, nearest
from tailora.formats import gguf, merged, mlx, portable
from tailora.formats.compare import Comparison, compare, logits, only, probe
from tailora.formats.io import replace_folder, writing
from tailora.formats.load import restore
from tailora.formats.low_rank_export import Source, refuse
from tailora.formats.peft import StoredAdapter, read_adapter, unknown_to_peft, write_adapter

Again = Callable[[Path, Source], AbstractContextManager[nn.Module]]
WIDER = "merge into a base in float32 (--dtype float32), or take a format that keeps the adapter apart"


@dataclass(frozen=True)
class Format:
    """problems: what it cannot hold.    write: fills a folder, says what it changed.
    again: the model that the folder gives, within the block.
    """

    problems: Callable[[Source], list[str]]
    write: Callable[[Path, Source], list[str]]
    again: Again


@dataclass(frozen=True)
class Exported:
    """files: name -> bytes.    changes: what differs from the adapter as trained, in words."""

    folder: Path
    format: str
    files: dict[str, int]
    changes: list[str]
    logits: Comparison

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def export(source: Source, folder: Path, to: str) -> Exported:
    """Write a new `folder` whole or not at all; what it gives when read back was compared with the live model.

    Raises ConfigError for an unknown format or a folder with something in it, FormatError with all that the format
    cannot hold and for a difference above the tolerance, MergeError, WriteError.
    """
    if to not in FORMATS:
        raise ConfigError(f"no format is called {to!r}{nearest(to, FORMATS)}; there are: {', '.join(FORMATS)}")
    check_new(folder)
    chosen = FORMATS[to]
    refuse(f"{to} cannot hold this adapter", chosen.problems(source))
    ids = probe(source.base_model)
    with only(source.base_model, source.adapter) as model:
        live = logits(model, ids)
    with only(source.base_model, None) as model:
        base = logits(model, ids)
    with replace_folder(folder) as fresh:
        changes = chosen.write(fresh, source)
        with chosen.again(fresh, source) as model:
            again = logits(model, ids)
        rounded = to == "merged" and common_dtype(source.base_model).itemsize == 2
        found = compare(live, base, again, rounded=rounded)
        found.check(f"{folder} ({to})", WIDER if rounded else "please report it")
        files = {path.name: path.stat().st_size for path in sorted(fresh.iterdir())}
    return Exported(folder, to, files, changes, found)


def check_new(folder: Path) -> None:
    """Raises ConfigError for what would be lost, WriteError for a path that cannot be looked at."""
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there already; give another folder, or delete it")


def _peft_problems(source: Source) -> list[str]:
    dialled = [path for path, layer in source.adapter.low_rank.items() if float(layer.strength) != 1]
    remedy = "set_scale(name, 1), or export to 'portable', which holds it"
    problems = [f"the strength dial of {len(dialled)} layers is not 1; {remedy}"] if dialled else []
    if unknown := unknown_to_peft(source.adapter):
        problems.append(
            f"PEFT has no use_dora on attention and parameters: {', '.join(unknown[:3])} ({len(unknown)} in all); "
            "save_adapter keeps it for tailora, and 'merged' holds it"
        )
    return problems


def _write_peft(folder: Path, source: Source) -> list[str]:
    write_adapter(folder, source.adapter, source.base_model)
    learned = any(layer.learns_scaling for layer in source.adapter.low_rank.values())
    return ["learned scales are multiplied into B; the metadata keeps them for tailora"] if learned else []


def _beside(read: Callable[[Path, Source], StoredAdapter]) -> Again:
    """For a folder that holds an adapter: the base with what was read from it."""

    def again(folder: Path, source: Source) -> AbstractContextManager[nn.Module]:
        return only(source.base_model, restore(read(folder, source), source.base_model))

    return again


_read_peft = _beside(lambda folder, _: read_adapter(folder))
FORMATS = {
    "peft": Format(_peft_problems, _write_peft, _read_peft),
    "portable": Format(portable.problems, portable.write, _read_peft),
    "gguf": Format(gguf.problems, gguf.write, _beside(lambda folder, source: gguf.read(folder, source.base_model))),
    "mlx": Format(mlx.problems, mlx.write, _beside(lambda folder, _: mlx.read(folder))),
    "merged": Format(merged.problems, merged.write, lambda folder, source: nullcontext(merged.load(folder, source))),
}
