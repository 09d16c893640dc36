"""How a class of layers stores its matrix and multiplies inputs by it: one small class for each layer type.

    LayerType            a product with one matrix, and the methods that differ between layer types
    Linear, Conv1D, Embedding, Convolution
                         layers of PyTorch and transformers; core.parameters adds two more
    register_layer_type  makes a class of layers adaptable
    LAYER_TYPES          name of a class -> its layer type, with functions that find the type of a layer

Shapes: A (r, in), B (out, r). Convolutions carry their kernel in A: A (r, in/groups, *kernel), B (out, r/groups).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.errors import ConfigError, MergeError, TargetError, listing

Shape = tuple[int, ...]


class LayerType(ABC):
    """A layer whose output is W x + b for its input x and one matrix W.

    replaces_forward: True if the adapted layer is not W x + s B A x, so that `forward` computes the whole output.
    """

    name: str = "Matrix"  # name in summaries and error messages
    weight_name: str = "weight"  # the layer's parameter that contains W
    zero_factor: Literal["A", "B"] = "B"  # the factor that starts at zero, so that a new update is zero
    is_linear: bool = False  # True if "all-linear" includes this layer type
    is_stacked: bool = False  # True if A and B contain one matrix per expert
    reads_numbers: bool = True  # True if x are numbers, which support casts and dropout; False for ids
    supports_dora: bool = True  # True if the output rows of W can have magnitudes
    supports_dropout: bool = True  # False if the update is not applied to the input, so that lora_dropout is impossible
    has_matrix: bool = True  # True if `matrix` can get W from the stored weight
    replaces_forward: bool = False

    @abstractmethod
    def dims(self, layer: Any) -> tuple[int, int]:
        """Returns (in, out) of the layer's matrix. The rank is at most the smaller of the two."""

    def shapes(self, layer: Any, r: int) -> tuple[Shape, Shape]:
        """Returns the shapes of A and B at rank r."""
        in_features, out_features = self.dims(layer)
        return (r, in_features), (out_features, r)

    def groups(self, _layer: Any) -> int:
        """Returns the number of blocks of W, each with its own inputs, outputs and ranks."""
        return 1

    def is_transposed(self, _layer: Any) -> bool:
        """Returns True if the weight is stored as (in, out)."""
        return False

    def update(self, _layer: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Returns B A x for the layer's input x, in the dtype of A. B already contains the scale."""
        return F.linear(F.linear(x, A), B)

    def factors(self, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns L (groups, m, r) and R (groups, r, n). L R is B A in the layout of the stored weight."""
        return (A.T[None], B.T[None]) if self.is_transposed(layer) else (B[None], A[None])

    def matrix(self, layer: Any, weight: Tensor) -> Tensor:
        """Returns W (groups, out/groups, n) from the stored weight."""
        return weight.T[None] if self.is_transposed(layer) else weight[None]

    def forward(self, layer: Any, adapters: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the layer's output with all these adapters, if `replaces_forward`."""
        raise NotImplementedError(f"{self.name} does not replace forward, because adapters only add to its output")

    def __reduce__(self) -> tuple[Callable[..., "LayerType"], tuple[str]]:
        """Makes copies and pickles return the object in LAYER_TYPES."""
        return layer_type_named, (self.name,)


# ---- Layers of PyTorch and transformers


class Linear(LayerType):
    name = "Linear"
    is_linear = True

    def dims(self, layer: Any) -> tuple[int, int]:
        return layer.in_features, layer.out_features


class Conv1D(LayerType):
    """The linear layer of GPT-2 in transformers, which stores its weight as (in, out)."""

    name = "Conv1D"
    is_linear = True

    def dims(self, layer: Any) -> tuple[int, int]:
        return layer.nx, layer.nf

    def is_transposed(self, _layer: Any) -> bool:
        return True


class Embedding(LayerType):
    """x are ids: A x is a column of A, and a row of the weight is a column of W."""

    name = "Embedding"
    zero_factor = "A"
    reads_numbers = False

    def dims(self, layer: Any) -> tuple[int, int]:
        return layer.num_embeddings, layer.embedding_dim

    def is_transposed(self, _layer: Any) -> bool:
        return True

    def update(self, layer: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        hidden = F.embedding(x, A.T, layer.padding_idx)  # (..., r)
        update = F.linear(hidden, B)
        scale = getattr(layer, "embed_scale", None)  # Gemma and others scale their embeddings
        return update if scale is None else update * scale


class Convolution(LayerType):
    """Conv1d, Conv2d and Conv3d: A convolves as the layer does, and B mixes the channels of each position."""

    name = "Conv"

    def dims(self, layer: Any) -> tuple[int, int]:
        return layer.in_channels * prod(layer.kernel_size), layer.out_channels

    def groups(self, layer: Any) -> int:
        return int(layer.groups)

    def shapes(self, layer: Any, r: int) -> tuple[Shape, Shape]:
        if r % layer.groups:
            raise TargetError(f"expected a multiple of {layer.groups} (the convolution's groups) for r, got {r}")
        return (r, layer.in_channels // layer.groups, *layer.kernel_size), (layer.out_channels, r // layer.groups)

    def update(self, layer: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        dimensions = len(layer.kernel_size)
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        groups = layer.in_channels // A.shape[1]  # one for a file whose A reads all channels of a grouped layer
        hidden = convolve(x, A, None, layer.stride, padding, layer.dilation, groups)
        pointwise = B[(..., *[None] * dimensions)]
        return convolve(hidden, pointwise, groups=layer.groups)

    def factors(self, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        groups = layer.groups
        if layer.in_channels // A.shape[1] != groups:
            raise MergeError(
                f"the update cannot be merged: A reads all {layer.in_channels} channels, but each of the layer's "
                f"{groups} groups reads only {layer.in_channels // groups}; keep it unmerged"
            )
        return B.view(groups, layer.out_channels // groups, -1), A.reshape(groups, A.shape[0] // groups, -1)

    def matrix(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)


LINEAR, CONV1D, EMBEDDING, CONVOLUTION = Linear(), Conv1D(), Embedding(), Convolution()

# By qualified name, to avoid importing transformers for its Conv1D.
LAYER_TYPES: dict[str, LayerType] = {
    "torch.nn.modules.linear.Linear": LINEAR,
    "transformers.pytorch_utils.Conv1D": CONV1D,
    "torch.nn.modules.sparse.Embedding": EMBEDDING,
    "torch.nn.modules.conv.Conv1d": CONVOLUTION,
    "torch.nn.modules.conv.Conv2d": CONVOLUTION,
    "torch.nn.modules.conv.Conv3d": CONVOLUTION,
    "gptqmodel.nn_modules.qlinear.BaseQuantLinear": LINEAR,
}
BUILT_IN = frozenset(LAYER_TYPES)


# ---- Layer types that the user registers


def register_layer_type(
    layer_class: type[nn.Module],
    dims: Callable[[Any], tuple[int, int]],
    *,
    update: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None,
    factors: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    shapes: Callable[[Any, int], tuple[Shape, Shape]] | None = None,
    forward: Callable[..., Any] | None = None,
    weight: str = "weight",
    transposed: bool = False,
    linear: bool = False,
    replace: bool = False,
) -> None:
    """Makes layers of this class and its subclasses adaptable, until the process exits.

    dims: layer -> (in, out) of its matrix.
    update: (layer, x, A, sB) -> the adapter's change of the layer's output; default: B A x.
    factors: (layer, A, B) -> (groups, m, r) and (groups, r, n), whose product has the layout of the weight.
    shapes: (layer, r) -> shapes of A and B; default: (r, in) and (out, r).
    forward: (layer, adapters, *args, **kwargs) -> the adapted layer's output; use it if `update` is not sufficient.
        `layer.plain.forward(layer, ...)` calls the layer's own forward.
    weight: name of the parameter with the matrix, (out, in), or (in, out) if `transposed`.
    linear: True if "all-linear" should include this class.
    replace: allow registering a class again.

    Classes are identified by their qualified name. Raises ConfigError for a registered name without `replace`, and for
    built-in layer types.
    """
    name = qualified_name(layer_class)
    problems = []
    if name in BUILT_IN or layer_class is nn.MultiheadAttention:
        problems.append(f"{name} is a built-in layer type and cannot be replaced; register a subclass instead")
    elif name in LAYER_TYPES and not replace:
        problems.append(f"{name} is already registered; pass replace=True to register it again")
    if forward is not None and update is not None:
        problems.append("expected either update or forward, got both")
    if problems:
        raise ConfigError(listing(problems))
    given = {"dims": dims, "shapes": shapes, "update": update, "factors": factors, "forward": forward}
    members: dict[str, Any] = {
        "name": name,
        "weight_name": weight,
        "is_linear": linear,
        "has_matrix": factors is None and shapes is None,
        "replaces_forward": forward is not None,
        "supports_dora": forward is None,
        "is_transposed": lambda _self, _layer: transposed,
        **{method: staticmethod(function) for method, function in given.items() if function is not None},
    }
    LAYER_TYPES[name] = type("RegisteredLayerType", (LayerType,), members)()


def unregister_layer_type(layer_class: type[nn.Module]) -> None:
    """Unregisters a class; existing models keep working. Raises ConfigError if it is not registered."""
    name = qualified_name(layer_class)
    if name not in LAYER_TYPES or name in BUILT_IN:
        registered = ", ".join(LAYER_TYPES.keys() - BUILT_IN) or "none"
        raise ConfigError(f"{name} is not registered; registered classes: {registered}")
    del LAYER_TYPES[name]


# ---- The layer type, weight and path of a layer


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def layer_type_named(name: str) -> LayerType:
    return next(layer_type for layer_type in LAYER_TYPES.values() if layer_type.name == name)


def layer_type_of(layer: nn.Module) -> LayerType | None:
    """Returns the type of the layer's class, or of the nearest parent class that has one; None without any."""
    names = map(qualified_name, type(layer).__mro__)
    return next((LAYER_TYPES[name] for name in names if name in LAYER_TYPES), None)


def weight_of(layer: nn.Module, name: str = "weight") -> Tensor:
    module, name = parameter_owner(layer, name)
    weight = module._parameters[name] if name in module._parameters else getattr(module, name)
    if not isinstance(weight, Tensor):
        raise TargetError(f"expected a tensor for {type(module).__name__}.{name}, got {type(weight).__name__}")
    return weight


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns the full tensor where it is computed with. All ranks must call this if it is sharded (FSDP2)."""
    sharded: Any = tensor
    # a DTensor; importing its class would take time
    return gather_shards(sharded.to_local(), sharded) if hasattr(tensor, "to_local") else tensor


def gather_shards(local: Tensor, like: Any) -> Tensor:
    """Returns the full tensor from the shards of all ranks. like: a DTensor that is sharded in the same way."""
    placed = local.to(computing_device(like))
    size = {"shape": like.shape, "stride": like.stride()}
    return cast(Tensor, type(like).from_local(placed, like.device_mesh, like.placements, **size).full_tensor())


def computing_device(weight: Tensor) -> torch.device:
    """Returns the device that computes with a weight, even if FSDP2 keeps its shards in host memory."""
    kind: str = weight.device_mesh.device_type if hasattr(weight, "device_mesh") else weight.device.type
    if kind == weight.device.type:
        return weight.device
    return torch.empty(0, device=kind).device  # with the index of the current one


def parameter_owner(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the submodule with the parameter `name`, such as "out_proj.weight", and its name there."""
    path, _, last = name.rpartition(".")
    return layer.get_submodule(path), last


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """Returns the module at this path; None if there is none.

    Ten times as fast as `get_submodule`, which matters because loading an adapter calls it often.
    """
    module = model
    for name in path.split(".") if path else ():
        child: Any = module._modules.get(name)
        if child is None and not isinstance(child := getattr(module, name, None), nn.Module):
            return None
        module = child
    return module


def find_layer(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Returns path and module of the layer that uses the matrix at `path`.

    This is the module at `path`, or its parent if `path` is a part, a parameter, or a matrix of attention. Raises
    AttributeError if there is none.
    """
    parent_path, _, name = path.rpartition(".")
    parent = submodule(model, parent_path)
    if parent is None:
        model.get_submodule(parent_path)  # raises with the missing name
    assert parent is not None
    module = submodule(parent, name)
    if module is None or (path and isinstance(parent, nn.MultiheadAttention)):
        return parent_path, parent
    return path, module


def layer_path_of(model: nn.Module, path: str) -> str:
    return find_layer(model, path)[0]


def layer_of(model: nn.Module, path: str) -> nn.Module:
    return find_layer(model, path)[1]


def is_called(layer: nn.Module) -> bool:
    """Returns False for the output projection of nn.MultiheadAttention, whose weight is read without calling it."""
    return type(layer).__name__ != "NonDynamicallyQuantizableLinear"


SAME_AS_LINEAR = (  # subclasses of nn.Linear with their own forward that also computes W x + b
    "transformers.models.esm.modeling_esmfold.EsmFoldLinear",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)


def computes_as_its_type(layer: nn.Module) -> bool:
    """True if the layer uses the forward of a known class, so that its function is known from its weight.

    Further classes of tailora declare this with `is_same_as_linear = True`.
    """
    cls: type[nn.Module] = getattr(layer, "plain", type(layer))
    owner = next(parent for parent in cls.__mro__ if "forward" in vars(parent))
    is_known = owner is nn.MultiheadAttention or qualified_name(owner) in (*LAYER_TYPES, *SAME_AS_LINEAR)
    return is_known or hasattr(layer, "embed_scale") or "is_same_as_linear" in vars(owner)


def forward_obstacle(layer: nn.Module) -> str | None:
    """Returns why an adapter next to this layer might change something else than W x + b; None if it does not.

    A subclass that overrides forward may be a router or a grouped layer.
    """
    if layer_type_of(layer) is None or computes_as_its_type(layer):
        return None
    name = getattr(layer, "plain", type(layer)).__name__
    return (
        f"{name} overrides forward, so its function is unknown; exclude it, or register its function with "
        "register_layer_type"
    )


# ---- Layers that cannot be adapted


def obstacle(layer: nn.Module) -> str | None:
    """Returns why this layer cannot be adapted although its class has a layer type; None if it can."""
    name = type(layer).__name__
    if "forward" in vars(layer):
        return (
            f"its forward was replaced on the instance, maybe by an offload hook; add the adapter before that ({name})"
        )
    if not is_called(layer):
        return "only its weight is used, the layer is never called"
    if isinstance(getattr(layer, "weight", None), nn.parameter.UninitializedParameter):
        return f"its shape is still unknown ({name}); run one batch through the model first"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm changes its frozen weight in every forward pass"
    return None
