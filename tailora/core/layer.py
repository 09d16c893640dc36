"""The update that one adapter adds to one layer: s (B A - B0 A0) x, and optional slots for DoRA and biases.

An adapted layer calls `LoRALayer.add_to`, which adds the adapter's change to W x + b. `LoRALayer.forward` computes
the update alone. The methods for the optional slots come last.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core import dora
from tailora.core.attach import AdapterPart
from tailora.core.config import scaling_divisor
from tailora.core.float32_products import adapted_linear
from tailora.core.fused_layers import OutputSlice
from tailora.core.layer_types import CONV1D, LAYER_TYPES, LINEAR, LayerType, Shape, qualified_name, whole_tensor
from tailora.errors import ConfigError, TargetError

# ---- How a fresh A and B are filled. One of the two is zero, so that training starts at the base model.


def kaiming(factor: Tensor, _: int) -> None:
    """U(-1/sqrt(in), 1/sqrt(in)), as in the reference implementation of arXiv:2106.09685."""
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def gaussian(factor: Tensor, r: int) -> None:
    """N(0, 1/r^2), like PEFT's "gaussian"."""
    nn.init.normal_(factor, std=1 / r)


INITS: dict[str, Callable[[Tensor, int], None]] = {"kaiming": kaiming, "gaussian": gaussian}


def concatenate_ranks(A: Tensor, other: Tensor, groups: int) -> Tensor:
    """Concatenates two factors A: (r, ...) and (r', ...) -> (r + r', ...), group by group."""
    blocks = [factor.reshape(groups, -1, *factor.shape[1:]) for factor in (A, other)]  # (groups, r/groups, ...)
    return torch.cat(blocks, 1).flatten(0, 1)


class LoRALayer(nn.Module, AdapterPart):
    """A low-rank update of a layer: `LoRALayer(in, out)(x)` is s B A x. You can train it alone or in a `LoRAModel`.

    scaling: s, a 0-dimensional buffer, or a Parameter of one element if it is learned. Assigning a number fixes it;
        assigning a Parameter makes it learned.
    output_slice: the outputs that the update changes, if they are only a part of the layer's outputs (such as q of a
        fused qkv). out_features is the number of these outputs; `forward` returns zero for all others.

    Optional slots, None when unused:
    start_A, start_B: frozen copies of the initial factors (`start_from`); the update is s (B A - B0 A0).

    lora_alpha=None means 2 r, the ratio of `LoRAConfig`'s defaults.
    init_lora_weights=None leaves A and B uninitialized, like `torch.empty`, for existing factors to be loaded.
    Raises ConfigError for a rank outside 1..min(in, out); existing factors may have a higher rank, as in PEFT.
    """

    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    layer_type: LayerType
    groups: int
    output_slice: OutputSlice | None
    strength: float  # factor for everything that the adapter adds, 1 unless set; not saved
    row_norms: dora.RowNorms | None
    lora_A: nn.Parameter  # Parameter (r, in)
    lora_B: nn.Parameter  # Parameter (out, r)
    scaling: Tensor
    start_A: Tensor | None
    start_B: Tensor | None
    lora_magnitude_vector: nn.Parameter | None  # Parameter (out,), m of DoRA (`add_dora`)
    lora_bias: nn.Parameter | None  # Parameter (out,), bias of B, scaled by s
    bias: nn.Parameter | None  # Parameter (out,), replaces the layer's bias (`add_trained_bias`)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 4,
        lora_alpha: float | None = None,
        learn_scaling: bool = False,
        *,
        lora_dropout: float = 0.0,
        lora_bias: bool = False,
        use_rslora: bool = False,
        init_lora_weights: str | None = "kaiming",
        layer_type: LayerType = LINEAR,
        shapes: tuple[Shape, Shape] | None = None,
        groups: int = 1,
        output_slice: OutputSlice | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1 or (init_lora_weights is not None and rank > min(in_features, out_features)):
            raise ConfigError(
                f"expected rank 1..{min(in_features, out_features)} for {in_features} -> {out_features}, got {rank}"
            )
        vars(self).update(  # all at once: nn.Module checks each assignment, which is slow for hundreds of layers
            in_features=in_features,
            out_features=out_features,
            r=rank,
            lora_alpha=2.0 * rank if lora_alpha is None else lora_alpha,
            use_rslora=use_rslora,
            lora_dropout=lora_dropout,
            layer_type=layer_type,
            groups=groups,
            output_slice=output_slice,
            row_norms=None,
            strength=1.0,  # a Python number: a strength of 1 needs no kernel
        )
        shape_A, shape_B = shapes or ((rank, in_features), (out_features, rank))
        A, B = (torch.empty(shape, device=device, dtype=dtype) for shape in (shape_A, shape_B))
        self._buffers.update(start_A=None, start_B=None)
        self._parameters.update(lora_A=nn.Parameter(A), lora_B=nn.Parameter(B))
        self._parameters.update(lora_magnitude_vector=None, lora_bias=None, bias=None)
        if lora_bias:
            self.lora_bias = nn.Parameter(torch.zeros(len(self.lora_B), device=device, dtype=dtype))
        scaling = self._scalar(self.configured_scaling)
        if self.configured_scaling > torch.finfo(scaling.dtype).max:
            raise ConfigError(f"lora_alpha = {self.lora_alpha:g} overflows {scaling.dtype}; use a value from 1 to 1000")
        self.register_buffer("scaling", scaling)
        if learn_scaling:
            self.scaling = nn.Parameter(scaling)
        if init_lora_weights is not None:
            self.reset_parameters(init_lora_weights)

    def reset_parameters(self, init_lora_weights: str = "kaiming") -> None:
        """Resets the factors: one is random, the other zero."""
        self.start_A = self.start_B = None
        if self.layer_type.zero_factor == "B":
            nn.init.zeros_(self.lora_B)
            INITS[init_lora_weights](self.lora_A, self.r)
        else:  # an embedding
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    # ---- The forward

    def add_to(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """Returns y + the adapter's change to the layer's output W x + b, for the input x.

        The change is s (B A - B0 A0) x, or (g - 1) W x + g s (B A - B0 A0) x + b' - b with all slots. It has the dtype
        and shape of `output`, and is multiplied by the strength: 0 turns the adapter off.
        """
        if self._adds_a_product(y, output):
            y = self._with_product(y, x)
            shift = self.bias_change(layer)
            return y if shift is None else y + self._over_kernel(shift, output.dtype)
        factors = None if self.lora_magnitude_vector is None else self.scaled_factors()
        update: Tensor = self(x, layer, output.dtype, factors)
        rescaling, shift = self.output_terms(layer, self.gain(layer, factors=factors))
        if rescaling is None:
            y = torch.add(y, update, alpha=self.strength)
        else:  # (g - 1) W x + g u is u + (g - 1) (W x + u) for the update u, so g multiplies one tensor, and not B too
            whole = output + update
            y = whole if y is output and self.strength == 1 else torch.add(y, update, alpha=self.strength)
            y = y + whole * self._over_kernel(rescaling, output.dtype)  # addcmul needs two more kernels in the backward
        return y if shift is None else y + self._over_kernel(shift, output.dtype)

    def forward(
        self,
        x: Tensor,
        layer: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Returns the update s (B A - B0 A0) x, (..., out), at strength 1, in `dtype` (default: the dtype of x).

        layer: the adapted layer, needed for a convolution's stride.
        factors: the result of `scaled_factors`.
        """
        dtype = dtype or (x.dtype if x.is_floating_point() else self.lora_A.dtype)
        if self.layer_type.reads_numbers:
            x = x.to(dtype)
            if self.lora_dropout:
                x = F.dropout(x, self.lora_dropout, self.training)
        A, B = factors or self.scaled_factors()
        update = self.layer_type.update(layer, x, A.to(dtype), B.to(dtype))  # B (A x), the scale in B
        return update if self.output_slice is None else self.output_slice.spread(update)

    def _adds_a_product(self, y: Tensor, output: Tensor) -> bool:
        """True if the adapter adds B (A x) of a linear layer and at most a bias."""
        return (
            self.layer_type in (LINEAR, CONV1D)
            and self.lora_magnitude_vector is None
            and self.output_slice is None
            and self.strength == 1
            and y.ndim > 1
            and y.dtype == output.dtype
        )

    def whole_output(self, x: Tensor, layer: Any) -> Tensor | None:
        """Returns W x + b + s (B A - B0 A0) x of a frozen linear layer where float32 is faster; None elsewhere."""
        is_plain = LAYER_TYPES.get(qualified_name(type(layer).plain)) is self.layer_type
        has_more = self.lora_bias is not None or self.bias is not None or (self.lora_dropout and self.training)
        weight = layer._parameters.get("weight")
        if not is_plain or has_more or not self._adds_a_product(x, x) or weight is None or weight.requires_grad:
            return None
        weight = weight if self.layer_type is LINEAR else weight.mT  # (out, in)
        return adapted_linear(x, weight, layer.bias, *self.scaled_factors())

    def _with_product(self, y: Tensor, x: Tensor) -> Tensor:
        """Returns y + s (B A - B0 A0) x without a tensor for the update, which would be a pass over (tokens, out)."""
        x = x.to(y.dtype)
        if self.lora_dropout:
            x = F.dropout(x, self.lora_dropout, self.training)
        A, B = self.scaled_factors()
        hidden = F.linear(x, A.to(y.dtype))  # (..., r)
        return torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), B.to(y.dtype).mT).view(y.shape)

    def update_factors(self, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns two factors whose product is g s (B A - B0 A0), times the strength; differentiable."""
        A, B = self.scaled_factors()
        if self.strength != 1:
            B = B * self.strength
        return A, B if gain is None else B * gain[:, None]

    def scaled_factors(self) -> tuple[Tensor, Tensor]:
        """Returns A and s B, two factors whose product is s (B A - B0 A0); differentiable.

        The scale multiplies B in B's own precision. In bfloat16, small changes of the scale would be lost.
        """
        A, B = self.unscaled_factors()
        return A, B * self.scaling

    def unscaled_factors(self) -> tuple[Tensor, Tensor]:
        """Returns two factors whose product is B A - B0 A0: A and B themselves without a frozen start.

        With a frozen start they have rank 2r: (B - B0) A + B0 (A - A0), whose differences are exactly zero at the start
        and small in low precision.
        """
        A, B = self.lora_A, self.lora_B
        if self.start_A is None or self.start_B is None:
            return A, B
        return concatenate_ranks(A, A - self.start_A, self.groups), torch.cat([B - self.start_B, self.start_B], 1)

    # ---- The update in the layout of the layer's weight

    def delta_weight(self, layer: nn.Module | None = None) -> Tensor:
        """Returns s (B A - B0 A0) with the shape of the layer's weight, in the adapter's precision."""
        left, right = self.weight_factors(layer)
        product = left @ right  # (groups, m, n)
        if self.layer_type.is_stacked:
            return product if len(product) > 1 else product[0]
        return product.flatten(0, 1).view(-1, *self.lora_A.shape[1:]) if self.lora_A.ndim > 2 else product.flatten(0, 1)

    def weight_factors(self, layer: nn.Module | None = None, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns L (groups, m, r) and R (groups, r, n): L R is g s (B A - B0 A0) as the weight (groups, m, n)."""
        A, B = self.update_factors(gain)
        return self.layer_type.factors(layer, A, B if self.output_slice is None else self.output_slice.spread(B.mT).mT)

    # ---- The scale

    @property
    def configured_scaling(self) -> float:
        """The scale computed from r and alpha, before training or assignment changes it."""
        return self.lora_alpha / scaling_divisor(self.r, self.use_rslora)

    @property
    def learns_scaling(self) -> bool:
        return "scaling" in self._parameters

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scaling":
            self._set_scaling(value)
        else:
            super().__setattr__(name, value)

    def _set_scaling(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ConfigError(f"expected one number per layer as scaling, got a tensor of shape {tuple(value.shape)}")
        for table in (self._parameters, self._buffers):
            table.pop("scaling", None)
        if isinstance(value, nn.Parameter):
            value.data = value.data.to(self.lora_A)  # the device and dtype of the layer
            self.register_parameter("scaling", value)
        else:
            number = value.detach().to(self.lora_A).reshape(()) if isinstance(value, Tensor) else self._scalar(value)
            self.register_buffer("scaling", number)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.lora_A.device, dtype=self.lora_A.dtype)

    # ---- The other slots

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor) -> None:
        """Sets the factors and subtracts their frozen product, so the update starts at zero and W stays as it is."""
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    @property
    def has_start(self) -> bool:
        return self.start_A is not None

    @property
    def is_zero(self) -> bool:
        """True if the update is exactly zero, as before training."""
        if self.start_A is not None and self.start_B is not None:
            return torch.equal(self.lora_A, self.start_A) and torch.equal(self.lora_B, self.start_B)
        return not all(factor.any() for factor in self.unscaled_factors())

    def add_dora(self, layer: nn.Module) -> None:
        """Gives every output row of the layer's W + s (B A - B0 A0) a trained norm m (arXiv:2402.09353, eq. 5).

        m is initialized to ||W||. Raises TargetError for a part of a fused layer.
        """
        if self.output_slice is not None:
            raise TargetError("use_dora is not supported for parts of fused layers; adapt the full layer")
        self.row_norms = dora.RowNorms(layer, self.layer_type, self.lora_A.dtype)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms.squares.sqrt().to(self.lora_A.dtype))

    def add_trained_bias(self, layer: nn.Module) -> None:
        """Adds a trained copy of the layer's bias. Does nothing if the layer has no bias."""
        if isinstance(bias := getattr(layer, "bias", None), Tensor):
            self.bias = nn.Parameter(whole_tensor(bias.detach()).to(self.lora_A, copy=True))

    @property
    def is_plain(self) -> bool:
        """True if the adapted layer is W x + s (B A - B0 A0) x + b, so that `update_factors` describe it completely."""
        return self.output_slice is None and self.lora_magnitude_vector is self.lora_bias is self.bias is None

    def gain(
        self, layer: nn.Module, *, exact: bool = False, factors: tuple[Tensor, Tensor] | None = None
    ) -> Tensor | None:
        """Returns g = m / ||W + s (B A - B0 A0)||, (out,), or None without DoRA.

        No gradient flows through the norm (arXiv:2402.09353, sec. 4.3).
        exact: compute it in float64, for a merge.
        factors: the result of `scaled_factors`.
        """
        if self.lora_magnitude_vector is None or self.row_norms is None:
            return None
        with torch.no_grad():
            A, B = (factor.detach() for factor in factors or self.scaled_factors())
            norms = self.row_norms(layer, A, B, exact=exact)
        return dora.gain(self.lora_magnitude_vector, norms, self.row_norms.has_zeros)

    def output_terms(self, layer: nn.Module, gain: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Returns the rescaling g - 1 of the layer's output W x + b, and the bias to add: (out,) each, None for zero.

        Rescaling the output also rescales b, so (g - 1) b is subtracted from the bias to add.
        """
        shift = self.bias_change(layer)
        if gain is None:
            return None, shift
        rescaling = self.rescaling(gain)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            shift = -rescaling * bias if shift is None else shift - rescaling * bias
        return rescaling, shift

    def rescaling(self, gain: Tensor) -> Tensor:
        """Returns (g - 1) times the strength, (out,)."""
        return gain - 1 if self.strength == 1 else self.strength * (gain - 1)

    def bias_change(self, layer: nn.Module) -> Tensor | None:
        """Returns the change of the layer's bias, s lora_bias + (trained copy - b), (out,); None for no change."""
        change = None if self.lora_bias is None else self.lora_bias * self.scaling
        if self.bias is not None:
            difference = self.bias - cast(Tensor, layer.bias)
            change = difference if change is None else change + difference
        return change if change is None or self.strength == 1 else change * self.strength

    def _over_kernel(self, vector: Tensor, dtype: torch.dtype) -> Tensor:
        """(out,) -> (out, 1, ...), with one dimension for each dimension of the kernel."""
        return vector.to(dtype)[(..., *[None] * (self.lora_A.ndim - 2))]

    def extra_repr(self) -> str:
        scaling = "learned" if self.learns_scaling else f"{self.scaling.item():g}"
        dropout = f", dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        return (
            f"{self.layer_type.name}, {self.in_features} -> {self.out_features}, r={self.r}, scaling={scaling}{dropout}"
        )


# ---- LoRA+: B learns faster than A (arXiv:2402.12354)


def names_with_higher_lr(module: nn.Module) -> set[str]:
    """Returns the names of the parameters with LoRA+'s higher learning rate: B of every update.

    Embeddings are excluded: their A looks up ids, but the ratio is derived for an A that sums over inputs (sec. 3).
    """
    layers = ((path, layer) for path, layer in module.named_modules() if isinstance(layer, LoRALayer))
    return {f"{path}.lora_B".removeprefix(".") for path, layer in layers if layer.layer_type.zero_factor == "B"}


def loraplus_groups(lora_layers: nn.Module, lr: float, loraplus_lr_ratio: float) -> list[dict[str, Any]]:
    """Returns parameter groups for any torch optimizer: lr * loraplus_lr_ratio for B, lr for all other parameters.

    Example: torch.optim.AdamW(loraplus_groups(model.lora_layers, lr=1e-4, loraplus_lr_ratio=16)). The paper uses
    ratios of 16 and more with an lr below LoRA's (sec. 5). Raises ConfigError for a ratio below 1.
    """
    if not loraplus_lr_ratio >= 1:
        raise ConfigError(f"expected loraplus_lr_ratio >= 1, got {loraplus_lr_ratio}")
    higher = names_with_higher_lr(lora_layers)
    groups: dict[float, list[nn.Parameter]] = {}  # by learning rate
    for name, parameter in lora_layers.named_parameters():
        groups.setdefault(lr * (loraplus_lr_ratio if name in higher else 1), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
