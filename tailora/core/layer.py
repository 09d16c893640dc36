"""The update s B A x of one adapter on one layer."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core.inits import INITS, standard_normal
from tailora.core.kinds import LINEAR, Kind, Shape
from tailora.errors import ConfigError

FEW = 32  # rows; on a CPU casting both factors costs more than a wider product of up to some 40 rows (measured)


def initial_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """alpha/r (arXiv:2106.09685, sec. 4.1), or alpha/sqrt(r) (rsLoRA, arXiv:2312.03732, thm. 3.2)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class LoRALayer(nn.Module):
    """A low-rank update of a layer: `LoRALayer(in, out)(x)` is s B A x. Trains on its own or within a `LoRAModel`.

    lora_A: Parameter (r, in).    lora_B: Parameter (out, r).
    scaling: 0-dimensional buffer, or a Parameter of one element when learned. Assigning a number fixes it,
        assigning a Parameter makes it learned.
    strength: run-time dial, 1 unless set; multiplies the scale and is not saved.

    lora_alpha=None stands for 2 r, the ratio of `LoRAConfig`'s defaults.
    Raises ConfigError for a rank outside 1..min(in, out).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: Tensor
    strength: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 4,
        lora_alpha: float | None = None,
        learn_scaling: bool = False,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: str | None = "kaiming",
        kind: Kind = LINEAR,
        shapes: tuple[Shape, Shape] | None = None,
        groups: int = 1,
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
        self.kind, self.groups = kind, groups
        shape_A, shape_B = shapes or ((rank, in_features), (out_features, rank))
        self.lora_A = nn.Parameter(torch.zeros(shape_A, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, device=device, dtype=dtype))
        self.register_buffer("strength", self._scalar(1.0), persistent=False)
        scaling = self._scalar(self.configured_scaling)
        self.scaling = nn.Parameter(scaling) if learn_scaling else scaling
        if init_lora_weights is not None:
            self.reset_parameters(init_lora_weights)

    def reset_parameters(self, init_lora_weights: str = "kaiming") -> None:
        """Start anew: one factor random, the other zero."""
        zero, random = (self.lora_B, self.lora_A) if self.kind.zero == "B" else (self.lora_A, self.lora_B)
        nn.init.zeros_(zero)
        (INITS[init_lora_weights] if self.kind.zero == "B" else standard_normal)(random, self.r)

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

    def scaled_B(self) -> Tensor:
        """s B (out, r). The scale meets B in B's own precision: in bfloat16 it would lose its small steps."""
        return self.lora_B * (self.scaling * self.strength)

    def forward(self, x: Tensor, layer: nn.Module | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """s B A x, (..., out). `layer` is the adapted layer where the kind needs its geometry, `dtype` the result's.

        Computes in `dtype`, without a wider copy of x (PEFT #2421); a few rows in evaluation, where decoding one token
        is all overhead, in the factors' own precision, without a copy of those.
        """
        dtype = dtype or (x.dtype if x.is_floating_point() else self.lora_A.dtype)
        few = x.numel() <= FEW * self.in_features and dtype.is_floating_point
        if few and not self.training and not torch.is_grad_enabled():
            return self._few_rows(x, layer).to(dtype)
        if self.kind.drops:
            x = F.dropout(x.to(dtype), self.lora_dropout, self.training)  # drawn anew by each call
        return self.kind.update(layer, x, self.lora_A.to(dtype), self.scaled_B().to(dtype))

    def _few_rows(self, x: Tensor, layer: nn.Module | None) -> Tensor:
        A, B, scale = self.lora_A, self.lora_B, self.scaling * self.strength
        if not x.is_floating_point():  # ids
            return self.kind.update(layer, x, A, B) * scale
        if x.numel() != self.in_features or A.ndim != 2:
            return self.kind.update(layer, x.to(A.dtype), A, B) * scale
        hidden = torch.mv(A, x.reshape(-1).to(A.dtype)) * scale  # (r,)
        return torch.mv(B, hidden).view(*x.shape[:-1], -1)

    def delta(self, layer: nn.Module | None = None) -> Tensor:
        """s B A in the layout of the layer's weight, in the adapter's precision."""
        left, right = self.factors(layer)
        product = (left @ right).flatten(0, 1)
        return product.view(-1, *self.lora_A.shape[1:]) if self.lora_A.ndim > 2 else product

    def factors(self, layer: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """The two whose product is s B A as the layer's weight holds it: (groups, m, r), (groups, r, n)."""
        return self.kind.factors(layer, self.lora_A, self.scaled_B())

    def extra_repr(self) -> str:
        scaling = "learned" if self.learns_scaling else f"{self.scaling.item():g}"
        dropout = f", dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        return f"{self.kind.name}, {self.in_features} -> {self.out_features}, r={self.r}, scaling={scaling}{dropout}"
