"""What is adapted, as a table that prints itself."""

from dataclasses import dataclass

from torch import nn

from tailora.core.adapter import Adapter
from tailora.core.layer_types import host_of
from tailora.core.quantization import dense_shape, weight_count

EXTRAS = {"bias": "bias", "trainable_tokens_delta": "token rows"}


@dataclass(frozen=True)
class Row:
    path: str
    kind: str
    shape: tuple[int, ...]
    r: int | None  # None for a module trained whole
    lora_alpha: float | None
    parameters: int


@dataclass(frozen=True)
class Summary:
    """Rows of the active adapters, and the parameters trained of all. `str()` gives the table."""

    rows: list[Row]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        cells = [("path", "kind", "shape", "r", "alpha", "parameters")]
        for row in self.rows:
            alpha = "-" if row.lora_alpha is None else f"{row.lora_alpha:g}"
            shape = " x ".join(map(str, row.shape))
            cells.append((row.path, row.kind, shape, str(row.r or "-"), alpha, f"{row.parameters:,}"))
        widths = [max(len(line[column]) for line in cells) for column in range(6)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        share = self.trainable_parameters / max(self.total_parameters, 1)
        lines.append(f"trained: {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2%})")
        return "\n".join(lines)


def summarise(base_model: nn.Module, adapters: list[Adapter]) -> Summary:
    rows = []
    for adapter in adapters:
        for path, layer in adapter.low_rank.items():
            shape = tuple(dense_shape(host_of(base_model, path), layer.kind.weight))
            shape = shape if layer.rows is None else (layer.out_features, layer.in_features)
            rows.append(Row(path, layer.kind.name, shape, layer.r, layer.lora_alpha, parameter_count(layer)))
        for path, module in adapter.saved.items():
            rows.append(Row(path, type(module).__name__, (), None, None, parameter_count(module)))
        for path, part in adapter.extras.items():
            for name, parameter in part.named_parameters():
                rows.append(Row(path, EXTRAS[name], tuple(parameter.shape), None, None, parameter.numel()))
    trained = sum(row.parameters for row in rows)
    return Summary(rows, trained, weight_count(base_model) + trained)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
