"""`tailora shrink`: an adapter of lower rank, by its singular values."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveInt

from tailora.cli.adapters import Base, OutputDir, base_name, check_new, facts, load, show, told
from tailora.cli.console import aside, note
from tailora.cli.flags import Json, flags_of, settings
from tailora.cli.models import named
from tailora.errors import ConfigError

if TYPE_CHECKING:
    from tailora.model import LoRAModel
    from tailora.train.config import TrainConfig

SHRINK_FLAGS: Any = flags_of({}, only=["field", "max_length"])
NO_SHRINK_FLAGS = SHRINK_FLAGS()
SOURCE = "source"
RESULT = "default"


def shrink(
    *,
    adapter: Annotated[Path, Parameter(help="folder of the adapter, or of the run that made it")],
    output_dir: OutputDir,
    r: Annotated[PositiveInt | None, Parameter(help="highest rank of a layer")] = None,
    energy: Annotated[float | None, Parameter(help="share of the squared singular values to keep, such as .99")] = None,
    max_loss_increase: Annotated[
        NonNegativeFloat | None, Parameter(help="nats per token by which the loss on --data may rise")
    ] = None,
    data: Annotated[str | None, Parameter(help="held-out data for --max-loss-increase, or 'demo'")] = None,
    model: Base = None,
    json: Json = False,
    flags: Annotated[SHRINK_FLAGS, Parameter(name="*")] = NO_SHRINK_FLAGS,
) -> int:
    """Make an adapter smaller: keep the singular values that matter, layer by layer."""
    folder = next(iter(named([str(adapter)]).values()))
    check_new(output_dir)
    if (data is None) != (max_loss_increase is None):
        raise ConfigError("--max-loss-increase and --data go together: the loss is measured on the data")
    from tailora.core.compress import check

    check(r, energy, loss=data and len, budget=max_loss_increase)  # before a model is loaded
    base = base_name(model, [folder])
    chosen = settings(flags, None, {}, {"model": base, **({"data": data} if data else {})})
    adapted, tokenizer = load(base, {SOURCE: folder}, device="cpu" if data is None else _device())
    if data is None:
        losses: dict[str, float] = {}
        report = adapted.shrink(SOURCE, RESULT, r=r, energy=energy)
    else:
        loss = loss_on(chosen.config, adapted, tokenizer)
        report = adapted.shrink(SOURCE, RESULT, loss=loss, budget=max_loss_increase)
        losses = {"loss_before": loss(adapted)}
        adapted.set_adapter(RESULT)
        losses["loss_after"] = loss(adapted)
    adapted.save_adapter(output_dir, RESULT)
    lines = [told(report)]
    if losses:
        lines.append(f"loss on {data}: {losses['loss_before']:.4f} before, {losses['loss_after']:.4f} after")
    show(f"shrunk {folder}", lines, base, output_dir, {**losses, **facts(report)}, json)
    return 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def loss_on(config: "TrainConfig", model: "LoRAModel", tokenizer: Any) -> Callable[["LoRAModel"], float]:
    """The loss of this model on all of the data, in nats per supervised token; every call is told on stderr."""
    from tailora.evaluation.held_out import held_out

    measured = held_out(config, model, tokenizer, note)

    def loss(_: "LoRAModel") -> float:
        value = measured().loss
        aside(f"loss {value:.4f}")
        return value

    return loss
