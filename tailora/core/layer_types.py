"""How a class of layer stores its matrix and multiplies its input by it: one small class for each layer type.

    LayerType            a product with one matrix, and the methods in which layer types differ
    Linear, Conv1D, Embedding, Convolution
                         layers of PyTorch and transformers; core.parameters adds two more
    register_layer_type  lets a class of layers be adapted
    LAYER_TYPES          name of a class -> its layer type, with the functions that find the type of a layer

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

    name: what summaries and error messages call the layer type.
    weight_name: the layer's parameter that holds W.
    zero_factor: the factor that starts at zero, so that a fresh update is zero.
    is_linear: True if "all-linear" means this layer type.
    is_stacked: True if A and B hold one matrix per expert.
    reads_numbers: True if x are numbers, which can be cast and dropped out; False for ids.
    supports_dora: True if the output rows of W can have magnitudes.
    supports_dropout: False if the update is never multiplied by the input itself, which lora_dropout would drop.
    has_matrix: True if `matrix` can read W off the stored weight.
    replaces_forward: True if the adapted layer is more than W x + s B A x, so that `forward` computes all of it.
    """

    name: str = "Matrix"
    weight_name: str = "weight"
    zero_factor: Literal["A", "B"] = "B"
    is_linear: bool = False
    is_stacked: bool = False
    reads_numbers: bool = True
    supports_dora: bool = True
    supports_dropout: bool = True
    has_matrix: bool = True
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
        """Returns True if the weight is stored as (in, out), so that an output of the layer is a column of it."""
        return False

    def update(self, _layer: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Returns B A x for the layer's input x, in the dtype of A. The caller has multiplied the scale into B."""
        return F.linear(F.linear(x, A), B)

    def factors(self, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns L (groups, m, r) and R (groups, r, n). L R is B A as the stored weight, seen as (groups, m, n)."""
        return (A.T[None], B.T[None]) if self.is_transposed(layer) else (B[None], A[None])

    def matrix(self, layer: Any, weight: Tensor) -> Tensor:
        """Returns W (groups, out/groups, n) out of the stored weight; B A in groups is added to it."""
        return weight.T[None] if self.is_transposed(layer) else weight[None]

    def forward(self, layer: Any, adapters: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what the layer computes with all these adapters, where `replaces_forward`."""
        raise NotImplementedError(f"an adapter adds to the output of {self.name}, it does not replace it")

    def __reduce__(self) -> tuple[Callable[..., "LayerType"], tuple[str]]:
        """Makes copies and pickles give the object in LAYER_TYPES."""
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
        scale = getattr(layer, "embed_scale", None)  # Gemma and others multiply what they look up
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
            raise TargetError(f"r = {r} on a convolution of {layer.groups} groups; take a multiple of {layer.groups}")
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
                f"A reads all {layer.in_channels} channels, but the layer's {groups} groups read "
                f"{layer.in_channels // groups} each: no weight of this layer can hold the update; keep it unmerged"
            )
        return B.view(groups, layer.out_channels // groups, -1), A.reshape(groups, A.shape[0] // groups, -1)

    def matrix(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)


LINEAR, CONV1D, EMBEDDING, CONVOLUTION = Linear(), Conv1D(), Embedding(), Convolution()

# By qualified name, so that transformers need not be imported to know its Conv1D.
LAYER_TYPES: dict[str, LayerType] = {
    "torch.nn.modules.linear.Linear": LINEAR,
    "transformers.pytorch_utils.Conv1D": CONV1D,
    "torch.nn.modules.sparse.Embedding": EMBEDDING,
    "torch.nn.modules.conv.Conv1d": CONVOLUTION,
    "torch.nn.modules.conv.Conv2d": CONVOLUTION,
    "torch.nn.modules.conv.Conv3d": CONVOLUTION,
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
    """Let layers of this class, and of classes derived from it, be adapted. Lasts as long as the process.

    dims: layer -> (in, out) of its matrix.
    update: (layer, x, A, sB) -> what the adapter adds to the layer's output; by default B A x.
    factors: (layer, A, B) -> (groups, m, r) and (groups, r, n), whose product has the layout of the weight.
    shapes: (layer, r) -> shapes of A and B; by default (r, in) and (out, r).
    forward: (layer, adapters, *args, **kwargs) -> the adapted layer's output; in place of `update`, where that does not
        suffice. `layer.plain.forward(layer, ...)` is the layer's own.
    weight: the name of the parameter that holds the matrix, as (out, in), or as (in, out) when `transposed`.
    linear: True if "all-linear" means this class, too.
    replace: allows a class to be registered again.

    The class is known by its qualified name. Raises ConfigError for a name that is registered already, without
    `replace`, and for one of tailora's own layer types.
    """
    name = qualified_name(layer_class)
    problems = []
    if name in BUILT_IN or layer_class is nn.MultiheadAttention:
        problems.append(f"{name} is a layer type of tailora's own, which cannot be replaced; register a derived class")
    elif name in LAYER_TYPES and not replace:
        problems.append(f"{name} is registered already; pass replace=True to register it again")
    if forward is not None and update is not None:
        problems.append("update and forward are both given; a layer type has one of the two")
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
    """Forget a registered class; models in use keep working. Raises ConfigError for one that is not registered."""
    name = qualified_name(layer_class)
    if name not in LAYER_TYPES or name in BUILT_IN:
        registered = ", ".join(LAYER_TYPES.keys() - BUILT_IN) or "none"
        raise ConfigError(f"{name} is not registered; registered are: {registered}")
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
        raise TargetError(f"{type(module).__name__}.{name} is a {type(weight).__name__}, not a tensor")
    return weight


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns the tensor; of one of which each rank holds a part (FSDP2) all of it, for which all ranks must call.

    It is on the device that computes with it, also if the parts are kept in host memory.
    """
    sharded: Any = tensor
    # a DTensor, whose class is not imported here: that takes time
    return gather_shards(sharded.to_local(), sharded) if hasattr(tensor, "to_local") else tensor


def gather_shards(local: Tensor, like: Any) -> Tensor:
    """Returns the whole tensor of which every rank gives its shard. like: a DTensor that is sharded in the same way."""
    placed = local.to(computing_device(like))
    size = {"shape": like.shape, "stride": like.stride()}
    return cast(Tensor, type(like).from_local(placed, like.device_mesh, like.placements, **size).full_tensor())


def computing_device(weight: Tensor) -> torch.device:
    """Returns the device that computes with a weight, of which FSDP2 may keep the parts in host memory."""
    kind: str = weight.device_mesh.device_type if hasattr(weight, "device_mesh") else weight.device.type
    if kind == weight.device.type:
        return weight.device
    return torch.empty(0, device=kind).device  # with the index of the current one


def parameter_owner(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the submodule that holds the parameter `name`, such as "out_proj.weight", and its name there."""
    path, _, last = name.rpartition(".")
    return layer.get_submodule(path), last


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """Returns the module at this path; None if there is none.

    Ten times as fast as `get_submodule`: loading an adapter asks several times for each of hundreds of layers.
    """
    module = model
    for name in path.split(".") if path else ():
        child: Any = module._modules.get(name)
        if child is None and not isinstance(child := getattr(module, name, None), nn.Module):
            return None
        module = child
    return module


def find_layer(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Returns path and module of what computes with the matrix at `path`.

    That is the module at `path`, or its parent where `path` names a part, a parameter, or a matrix of attention.
    Raises AttributeError if there is none.
    """
    parent_path, _, name = path.rpartition(".")
    parent = submodule(model, parent_path)
    if parent is None:
        model.get_submodule(parent_path)  # says what is missing
    assert parent is not None
    module = submodule(parent, name)
    if module is None or (path and isinstance(parent, nn.MultiheadAttention)):
        return parent_path, parent
    return path, module


def layer_path_of(model: nn.Module, path: str) -> str:
    """Returns the path of the module that computes with the matrix at `path`."""
    return find_layer(model, path)[0]


def layer_of(model: nn.Module, path: str) -> nn.Module:
    """Returns the module that computes with the matrix at `path`."""
    return find_layer(model, path)[1]


def is_called(layer: nn.Module) -> bool:
    """Returns False for the output projection of nn.MultiheadAttention, whose weight is read without calling it."""
    return type(layer).__name__ != "NonDynamicallyQuantizableLinear"


SAME_AS_LINEAR = (  # classes derived from nn.Linear whose own forward computes W x + b, too
    "transformers.models.esm.modeling_esmfold.EsmFoldLinear",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)


def computes_as_its_type(layer: nn.Module) -> bool:
    """True if the layer's forward is that of a known class, so that its weight alone says what it computes."""
    cls: type[nn.Module] = getattr(layer, "plain", type(layer))
    owner = next(parent for parent in cls.__mro__ if "forward" in vars(parent))
    is_known = owner is nn.MultiheadAttention or qualified_name(owner) in (*LAYER_TYPES, *SAME_AS_LINEAR)
    return is_known or hasattr(layer, "embed_scale")


# ---- Layers that cannot be adapted


def obstacle(layer: nn.Module) -> str | None:
    """Returns why this layer cannot be adapted although its class has a layer type; None if it can."""
    name = type(layer).__name__
    if "forward" in vars(layer):
        return f"its forward was replaced on the instance (an offload hook?); attach adapters before that ({name})"
    if not is_called(layer):
        return "its weight is read without calling it"
    if isinstance(getattr(layer, "weight", None), nn.parameter.UninitializedParameter):
        return f"its shape is not known yet ({name}); run one batch through the model first"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm rewrites its frozen weight at every look-up"
    is_attention = isinstance(layer, nn.MultiheadAttention)
    if (is_attention or layer_type_of(layer) is EMBEDDING) and not computes_as_its_type(layer):
        return f"{name} overrides forward, so what it computes is not known"
    return None
