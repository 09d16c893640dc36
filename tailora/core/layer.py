"""What one adapter adds to one layer: s (B A - B0 A0) x, and the other slots of the equation that it fills."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core import dora
from tailora.core.fused_layers import OutputSlice
from tailora.core.geometry import Shape
from tailora.core.layer_types import LINEAR, LayerType
from tailora.errors import ConfigError

# ---- How a fresh A and B are filled. One of the two is zero, so that training starts at the base model.


def kaiming(factor: Tensor, _: int) -> None:
    """U(-1/sqrt(in), 1/sqrt(in)): the reference implementation of arXiv:2106.09685."""
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def gaussian(factor: Tensor, r: int) -> None:
    """N(0, 1/r^2), as PEFT's "gaussian"."""
    nn.init.normal_(factor, std=1 / r)


def standard_normal(factor: Tensor, _: int) -> None:
    """N(0, 1): what an embedding's B starts from, since its A is the factor that is zero."""
    nn.init.normal_(factor)


INITS: dict[str, Callable[[Tensor, int], None]] = {"kaiming": kaiming, "gaussian": gaussian}


# ----


FEW = 32  # rows; on a CPU casting both factors costs more than a wider product of up to some 40 rows (measured)


def initial_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """alpha/r (arXiv:2106.09685, sec. 4.1), or alpha/sqrt(r) (rsLoRA, arXiv:2312.03732, thm. 3.2)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def _times(gain: Tensor | None, B: Tensor) -> Tensor:
    return B if gain is None else B * gain[:, None]


def beside(A: Tensor, other: Tensor, groups: int) -> Tensor:
    """Two A as one of both ranks: (r, ...) and (r', ...) -> (r + r', ...), group by group."""
    blocks = [each.reshape(groups, -1, *each.shape[1:]) for each in (A, other)]  # (groups, r/groups, ...)
    return torch.cat(blocks, 1).flatten(0, 1)


class LoRALayer(nn.Module):
    """A low-rank update of a layer: `LoRALayer(in, out)(x)` is s B A x. Trains on its own or within a `LoRAModel`.

    lora_A: Parameter (r, in).    lora_B: Parameter (out, r).
    scaling: 0-dimensional buffer, or a Parameter of one element when learned. Assigning a number fixes it,
        assigning a Parameter makes it learned.
    strength: run-time dial, 1 unless set; multiplies all that the adapter adds and is not saved.
    rows: of the layer, where the update is one of a part (q of a fused qkv): out_features are those of the part, and
        what `forward` gives is zero in all other rows.

    Slots, None where they are empty:
    start_A, start_B: frozen copies of where A and B started (`start_from`); the update is s (B A - B0 A0).
    lora_E: Parameter (r,), trained between them: B diag(E) A of AdaLoRA (`diagonal`).
    lora_magnitude_vector: Parameter (out,), m of DoRA (`magnify`).
    lora_bias: Parameter (out,) beside B; s times it is added.
    bias: Parameter (out,), trained in the place of the layer's own (`take_bias`).

    lora_alpha=None stands for 2 r, the ratio of `LoRAConfig`'s defaults.
    Raises ConfigError for a rank outside 1..min(in, out).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: Tensor
    strength: Tensor
    start_A: Tensor | None
    start_B: Tensor | None
    lora_E: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    lora_bias: nn.Parameter | None
    bias: nn.Parameter | None

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
        rows: OutputSlice | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ConfigError(
                f"rank = {rank} on a layer of {in_features} -> {out_features}; take 1..{min(in_features, out_features)}"
            )
        self.in_features, self.out_features, self.r = in_features, out_features, rank
        self.lora_alpha = 2.0 * rank if lora_alpha is None else lora_alpha
        self.use_rslora = use_rslora
        self.lora_dropout = lora_dropout
        self.layer_type, self.groups, self.rows = layer_type, groups, rows
        shape_A, shape_B = shapes or ((rank, in_features), (out_features, rank))
        self.lora_A = nn.Parameter(torch.zeros(shape_A, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, device=device, dtype=dtype))
        self.register_buffer("strength", self._scalar(1.0), persistent=False)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.register_parameter("lora_E", None)
        self.register_parameter("lora_magnitude_vector", None)
        self.register_parameter("lora_bias", None)
        self.register_parameter("bias", None)
        self.row_norms: dora.RowNorms | None = None
        if lora_bias:
            self.lora_bias = nn.Parameter(torch.zeros(len(self.lora_B), device=device, dtype=dtype))
        scaling = self._scalar(self.configured_scaling)
        if self.configured_scaling > torch.finfo(scaling.dtype).max:
            raise ConfigError(f"lora_alpha = {self.lora_alpha:g} is more than {scaling.dtype} can hold; take 1 to 1000")
        self.scaling = nn.Parameter(scaling) if learn_scaling else scaling
        if init_lora_weights is not None:
            self.reset_parameters(init_lora_weights)

    def reset_parameters(self, init_lora_weights: str = "kaiming") -> None:
        """Start anew: one factor random, the other zero."""
        self.start_A = self.start_B = None
        zero, random = (self.lora_B, self.lora_A) if self.layer_type.zero == "B" else (self.lora_A, self.lora_B)
        nn.init.zeros_(zero)
        (INITS[init_lora_weights] if self.layer_type.zero == "B" else standard_normal)(random, self.r)

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor) -> None:
        """Start at these factors, with their product taken off again: W is never touched, and the update is zero.

        A, B: shapes of lora_A and lora_B. Raises ConfigError for other shapes and for numbers that are not finite.
        """
        for name, given, own in (("A", A, self.lora_A), ("B", B, self.lora_B)):
            if given.shape != own.shape or not given.isfinite().all():
                what = f"shape {tuple(given.shape)}" if given.shape != own.shape else "numbers that are not finite"
                raise ConfigError(f"start of {name}: {what}; take {tuple(own.shape)}, all finite")
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def diagonal(self) -> None:
        """From here on the update is s B diag(E) A, with E = 0 and orthonormal A and B (arXiv:2303.10512, eq. 3).

        The paper's A and B are Gaussian, and spend their first steps on its penalty for not being orthonormal.
        """
        for factor in (self.lora_A, self.lora_B):
            nn.init.orthogonal_(factor)
        self.lora_E = nn.Parameter(torch.zeros(self.r, device=self.lora_A.device, dtype=self.lora_A.dtype))

    def magnify(self, layer: nn.Module) -> None:
        """DoRA: from here on every output row of the layer's W + s (B A - B0 A0) has the norm m, which starts at
        ||W|| and is trained (arXiv:2402.09353, eq. 5).
        """
        self.row_norms = dora.RowNorms(layer, self.layer_type, self.lora_A.dtype, self.rows)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms.squares.sqrt().to(self.lora_A.dtype))

    def take_bias(self, layer: nn.Module) -> None:
        """Train a copy of the layer's bias. Nothing where it has none."""
        if isinstance(bias := getattr(layer, "bias", None), Tensor):
            self.bias = nn.Parameter(bias.detach().to(self.lora_A, copy=True))

    @property
    def is_plain(self) -> bool:
        """The layer becomes W x + s (B A - B0 A0) x + b: what a product of two factors can say (`update_factors`)."""
        return self.rows is None and self.lora_magnitude_vector is self.lora_bias is self.bias is None

    @property
    def has_start(self) -> bool:
        return self.start_A is not None

    @property
    def configured_scaling(self) -> float:
        """The scale that r and alpha say, before any learning or assignment."""
        return initial_scaling(self.r, self.lora_alpha, self.use_rslora)

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
            raise ConfigError(f"scaling is one number per layer; got a tensor of shape {tuple(value.shape)}")
        if not isinstance(value, nn.Parameter):
            value = value.detach().to(self.strength).reshape(()) if isinstance(value, Tensor) else self._scalar(value)
        if isinstance(value, nn.Parameter):
            value.data = value.data.to(self.strength)  # where the layer is
        self._parameters.pop("scaling", None)
        self._buffers.pop("scaling", None)
        self._non_persistent_buffers_set.discard("scaling")
        if isinstance(value, nn.Parameter):
            self.register_parameter("scaling", value)
        else:
            self.register_buffer("scaling", value)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.lora_A.device, dtype=self.lora_A.dtype)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Two factors whose product is B A - B0 A0: A and B (or B diag(E)), or of rank 2r with a frozen start.

        There (B - B0) A + B0 (A - A0): differences that are exactly zero at the start, and small in low precision.
        """
        A, B = self.lora_A, self.lora_B if self.lora_E is None else self.lora_B * self.lora_E
        if self.start_A is None or self.start_B is None:
            return A, B
        return beside(A, A - self.start_A, self.groups), torch.cat([B - self.start_B, self.start_B], 1)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Two factors whose product is s (B A - B0 A0), by which a forward multiplies x; differentiable.

        The scale meets B in B's own precision: in bfloat16 it would lose its small steps.
        """
        A, B = self.pair()
        return A, B * (self.scaling * self.strength)

    def forward(
        self, x: Tensor, layer: nn.Module | None = None, dtype: torch.dtype | None = None, gain: Tensor | None = None
    ) -> Tensor:
        """g s (B A - B0 A0) x, (..., out). `layer` is the adapted layer where the kind needs its geometry, `dtype` the
        result's, `gain` g (out,), 1 without; the other slots are left out (`change`).

        Computes in `dtype`, without a wider copy of x (PEFT #2421); a few rows in evaluation, where decoding one token
        is all overhead, in the factors' own precision, without a copy of those.
        """
        dtype = dtype or (x.dtype if x.is_floating_point() else self.lora_A.dtype)
        few = x.numel() <= FEW * self.in_features and dtype.is_floating_point
        if few and not self.training and not torch.is_grad_enabled():
            return self._on_rows(self._few_rows(x, layer, gain).to(dtype))
        if self.layer_type.drops:
            x = F.dropout(x.to(dtype), self.lora_dropout, self.training)  # drawn anew by each call
        A, B = self.update_factors()
        return self._on_rows(self.layer_type.update(layer, x, A.to(dtype), _times(gain, B).to(dtype)))

    def _on_rows(self, update: Tensor) -> Tensor:
        return update if self.rows is None else self.rows.spread(update)

    def _few_rows(self, x: Tensor, layer: nn.Module | None, gain: Tensor | None) -> Tensor:
        (A, B), scale = self.pair(), self.scaling * self.strength
        B = _times(gain, B)
        if not x.is_floating_point():  # ids
            return self.layer_type.update(layer, x, A, B) * scale
        if x.numel() != self.in_features or A.ndim != 2:
            return self.layer_type.update(layer, x.to(A.dtype), A, B) * scale
        hidden = torch.mv(A, x.reshape(-1).to(A.dtype)) * scale  # (r,)
        return torch.mv(B, hidden).view(*x.shape[:-1], -1)

    def added(self, y: Tensor, base: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """y and what the adapter changes of the layer's output."""
        return y + self.change(base, x, layer)

    def change(self, base: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """What the adapter adds to the layer's output `base` = W x + b: (g - 1) W x + g s (B A - B0 A0) x + b' - b.

        In the dtype and shape of `base`. The strength multiplies all of it, so that 0 is off; several adapters add up.
        """
        gain = self.gain(layer)
        change: Tensor = self(x, layer, base.dtype, gain)
        extra, shift = self.around(layer, gain)
        if extra is not None:
            change = torch.addcmul(change, base, self._spread(extra, base.dtype))
        return change if shift is None else change + self._spread(shift, base.dtype)

    def around(self, layer: nn.Module, gain: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What is added besides the product: the layer's output times the first, and the second; (out,) each."""
        shift = self.bias_change(layer)
        if gain is None:
            return None, shift
        extra = self.excess(gain)
        own = getattr(layer, "bias", None)
        if own is not None:
            shift = -extra * own if shift is None else shift - extra * own
        return extra, shift

    def excess(self, gain: Tensor) -> Tensor:
        """By how much the rows of W are scaled beyond 1, times the strength: of all of the layer's outputs, (out,)."""
        return self._on_rows(self.strength * (gain - 1))

    def gain(self, layer: nn.Module, *, exact: bool = False) -> Tensor | None:
        """g = m / ||W + s (B A - B0 A0)||, (out,), or None without DoRA. No gradient flows through the norm (sec. 4.3).

        exact: the norm in float64, for what is merged.
        """
        if self.lora_magnitude_vector is None or self.row_norms is None:
            return None
        with torch.no_grad():
            A, B = self.pair()
            B = B * self.scaling
            norms = self.row_norms.exact(layer, A, B) if exact else self.row_norms(layer, A, B)
        return dora.gain(self.lora_magnitude_vector, norms)

    def bias_change(self, layer: nn.Module) -> Tensor | None:
        """What is added to the layer's bias: s lora_bias + (its trained copy - b), (out,); None where nothing is."""
        change = None if self.lora_bias is None else self.lora_bias * self.scaling
        if self.bias is not None:
            moved = self.bias - cast(Tensor, layer.bias)
            change = moved if change is None else change + moved
        return None if change is None else change * self.strength

    def _spread(self, vector: Tensor, dtype: torch.dtype) -> Tensor:
        """(out,) -> (out, 1, ...), one dimension more per dimension of the kernel."""
        return vector.to(dtype)[(..., *[None] * (self.lora_A.ndim - 2))]

    def delta(self, layer: nn.Module | None = None) -> Tensor:
        """s (B A - B0 A0) in the layout of the layer's weight, in the adapter's precision."""
        left, right = self.factors(layer)
        product = left @ right  # (groups, m, n)
        if self.layer_type.stacked:
            return product if len(product) > 1 else product[0]
        return product.flatten(0, 1).view(-1, *self.lora_A.shape[1:]) if self.lora_A.ndim > 2 else product.flatten(0, 1)

    def factors(self, layer: nn.Module | None = None, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The two whose product is g s (B A - B0 A0) as the layer's weight holds it: (groups, m, r), (groups, r, n)."""
        A, B = self.update_factors()
        B = _times(gain, B)
        return self.layer_type.factors(layer, A, B if self.rows is None else self.rows.spread(B.mT).mT)

    def extra_repr(self) -> str:
        scaling = "learned" if self.learns_scaling else f"{self.scaling.item():g}"
        dropout = f", dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        return (
            f"{self.layer_type.name}, {self.in_features} -> {self.out_features}, r={self.r}, scaling={scaling}{dropout}"
        )
