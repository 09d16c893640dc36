"""What of a model can be adapted: whole layers, parts of fused ones, projections of attention, named parameters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tailora.core.config import LoRAConfig
from tailora.core.fused_layers import Rows, layout_of, rows_of
from tailora.core.layer_types import Kind, host_path, kind_of, parameter_kind, projections
from tailora.core.patterns import by_pattern, named
from tailora.core.quantization import dense_weight
from tailora.errors import TargetError

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Place:
    """One matrix of the model. `layer`, found at the path `host`, is the module that computes with it."""

    path: str
    host: str
    layer: nn.Module
    kind: Kind
    rows: Rows | None = None  # of a part

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that select it: a projection of attention goes by the attention's, too, as in PEFT."""
        return (self.path,) if self.rows or self.kind.stacked else tuple(dict.fromkeys((self.path, self.host)))

    @property
    def pattern_names(self) -> tuple[str, ...]:
        """The paths that a pattern for rank or alpha may match: of a part and a projection the whole layer's, too."""
        return (self.path,) if self.kind.stacked else tuple(dict.fromkeys((self.path, self.host)))

    @property
    def end(self) -> str:
        """The last name of its path; of a part or parameter the last two."""
        return ".".join(self.path.split(".")[-1 if self.path == self.host else -2 :])

    @property
    def dims(self) -> tuple[int, int]:
        """(in, out)."""
        in_features, out_features = self.kind.dims(self.layer)
        return in_features, self.rows.size if self.rows else out_features

    @property
    def weight(self) -> Tensor:
        """What holds it, dequantised; of a part the whole layer's."""
        return dense_weight(self.layer, self.kind.weight)

    def matrix(self, weight: Tensor) -> Tensor | None:
        """W as the equation has it, (groups, out/groups, n), out of what holds it; None for what is not one matrix."""
        if self.kind.matrix is None:
            return None
        W = self.kind.matrix(self.layer, weight)
        return W if self.rows is None else self.rows.take(W.mT).mT


def places(modules: Modules, config: LoRAConfig) -> dict[str, Place]:
    """All that `target_modules` can name, by path, in the model's order.

    Raises TargetError for `fused_parts` that do not fit.
    """
    found: dict[str, Place] = {}
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0], module)
        found |= {place.path: place for place in _of_module(path, module, parent, config)}
    return found


def place_at(model: nn.Module, path: str, config: LoRAConfig) -> Place:
    """The place at this path, without a look at the rest of the model. Raises TargetError where there is none."""
    host = host_path(model, path)
    module, parent = model.get_submodule(host), model.get_submodule(host.rpartition(".")[0])
    found = [*_of_module(host, module, parent, config), *_parameters_of(host, module)]
    place = next((place for place in found if place.path == path), None)
    if place is None:
        raise TargetError(f"{path} is a {type(module).__name__}, which has no low-rank form there")
    return place


def _of_module(path: str, module: nn.Module, parent: nn.Module, config: LoRAConfig) -> Iterator[Place]:
    for name, projection in projections(module).items():
        yield Place(f"{path}.{name}" if path else name, path, module, projection)
    kind = kind_of(module)
    if kind is None or (parent is not module and projections(parent)):
        return
    yield Place(path, path, module, kind)
    if kind.linear and path:
        for part, rows in _rows(path, parent, kind.dims(module)[1], config).items():
            yield Place(f"{path}.{part}", path, module, kind, rows)


def _rows(path: str, parent: nn.Module, total: int, config: LoRAConfig) -> dict[str, Rows]:
    told = by_pattern(path, config.fused_parts, None)
    layout = layout_of(parent, path.rpartition(".")[2], total) if told is None else told
    try:
        return rows_of(layout, total) if layout else {}
    except ValueError as error:
        raise TargetError(f"fused_parts: {path}: {error}") from None


def parameters(modules: Modules) -> dict[str, Place]:
    """All that `target_parameters` can name: matrices and stacks of them that no kind of layer computes with."""
    return {place.path: place for host, module in modules.items() for place in _parameters_of(host, module)}


def _parameters_of(host: str, module: nn.Module) -> Iterator[Place]:
    if host and not kind_of(module) and not projections(module):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim in (2, 3):
                yield Place(f"{host}.{name}", host, module, parameter_kind(name))


def chosen_parameters(modules: Modules, config: LoRAConfig) -> dict[str, Place]:
    wanted = config.target_parameters or []
    return {path: place for path, place in parameters(modules).items() if any(named(name, path) for name in wanted)}
