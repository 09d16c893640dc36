"""The table that the laws run over: kinds x slots."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, quantize_
from transformers.pytorch_utils import Conv1D

from tailora import LoRAConfig, LoRALayer, LoRAModel
from tailora.core.kinds import EMBEDDING


class Net(nn.Module):
    """One layer of the kind, between names that a path has to pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"target": layer})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block["target"](x)
        return y


@dataclass(frozen=True)
class KindCase:
    name: str
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()  # of x; () means ids
    r: int = 4
    peft_is_wrong: str = ""  # why PEFT cannot be the oracle

    store: Callable[[nn.Module], nn.Module] | None = None  # how its weight is quantised
    apart: float = 1e-5  # of outputs in evaluation from those of the dense weight, relative

    def net(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
        torch.manual_seed(seed)
        layer = self.layer().to(dtype)
        return Net(self.store(layer) if self.store else layer)

    def batch(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if not self.shape:
            ids = torch.randint(0, 20, (3, 5), generator=generator)
            ids[0, 0] = 0  # the padding id, which has no gradient
            return ids
        return torch.randn(self.shape, generator=generator).to(dtype)


KINDS = [
    KindCase("linear", lambda: nn.Linear(12, 10), (3, 5, 12)),
    KindCase("linear without bias", lambda: nn.Linear(12, 10, bias=False), (12,)),
    KindCase("transformers conv1d", lambda: Conv1D(10, 12), (3, 5, 12)),
    KindCase("embedding", lambda: nn.Embedding(20, 12, padding_idx=0)),
    KindCase("conv1d", lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    KindCase("conv2d", lambda: nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=1), (2, 6, 7, 8)),
    KindCase("conv2d same", lambda: nn.Conv2d(6, 8, 3, padding="same"), (2, 6, 7, 8)),
    KindCase("conv3d", lambda: nn.Conv3d(4, 6, 2), (2, 4, 4, 5, 4)),
    KindCase("conv2d grouped", lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 6, 6), r=8),
    KindCase("conv1d depthwise", lambda: nn.Conv1d(6, 6, 3, groups=6), (2, 6, 9), r=6),
    KindCase(
        "conv2d dilated", lambda: nn.Conv2d(6, 8, 3, dilation=2), (2, 6, 9, 9), peft_is_wrong="its A is not dilated"
    ),
    KindCase(
        "conv2d reflect",
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        (2, 6, 7, 7),
        peft_is_wrong="its A pads with zeros",
    ),
]


# ---- bases: how the weight of a kind is stored


def bitsandbytes_4bit(quant_type: str, double: bool) -> Callable[[nn.Module], nn.Module]:
    def store(layer: Any) -> nn.Module:
        weight, made = _as_linear(layer, lambda *sizes: bitsandbytes.nn.Linear4bit(*sizes, quant_type=quant_type))
        settings = {"quant_type": quant_type, "compress_statistics": double, "module": made}
        made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **settings)
        return made.to("cpu")

    return store


def bitsandbytes_int8(layer: nn.Module) -> nn.Module:
    weight, made = _as_linear(layer, lambda *sizes: bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False))
    made.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def _as_linear(layer: Any, make: Callable[..., Any]) -> tuple[Tensor, Any]:
    """The weight (out, in), and a layer of bitsandbytes as transformers makes it, a Conv1D's from the transpose."""
    weight = layer.weight.detach().clone()
    weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    made = make(weight.shape[1], weight.shape[0], layer.bias is not None)
    made.bias, made.source_cls = layer.bias, type(layer)
    return weight, made


def torchao_weights(config: Any) -> Callable[[nn.Module], nn.Module]:
    def store(layer: nn.Module) -> nn.Module:
        quantize_(layer.requires_grad_(False), config)
        del layer.extra_repr  # a method of a partial function, which no pickle takes; transformers exchanges it, too
        return layer

    return store


@dataclass(frozen=True)
class BaseCase:
    """`kinds` are those that the base can hold; `others` says why it holds no others."""

    name: str
    store: Callable[[nn.Module], nn.Module]
    kinds: tuple[str, ...]
    others: str
    apart: float = 1e-5
    vectors: bool = True  # whether a layer takes a single vector


LINEARS = ("linear", "linear without bias")
BITSANDBYTES: dict[str, Any] = {
    "kinds": (*LINEARS, "transformers conv1d"),
    "others": "bitsandbytes has linear layers; its embeddings override forward and cannot be saved",
}
TORCHAO: dict[str, Any] = {"kinds": LINEARS, "others": "torchao quantises nn.Linear, and no other unless told so"}
BASES = [
    BaseCase("nf4", bitsandbytes_4bit("nf4", double=True), **BITSANDBYTES),
    BaseCase("fp4", bitsandbytes_4bit("fp4", double=False), **BITSANDBYTES),
    # LLM.int8 rounds the input, too, where it does not train
    BaseCase("int8", bitsandbytes_int8, **BITSANDBYTES, apart=2e-2, vectors=False),
    BaseCase("torchao int8", torchao_weights(Int8WeightOnlyConfig(version=2)), **TORCHAO),
    BaseCase("torchao int4", torchao_weights(IntxWeightOnlyConfig(torch.int4, PerAxis(0))), **TORCHAO),
]


def quantized(kind: KindCase, base: BaseCase) -> KindCase:
    shape = kind.shape if base.vectors or len(kind.shape) > 1 else (5, *kind.shape)
    return replace(kind, name=f"{kind.name}, {base.name}", store=base.store, apart=base.apart, shape=shape)


SLOTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "learned scale": {"learn_scaling": True},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "alpha pattern": {"alpha_pattern": {"target": 3}},
    "dora": {"use_dora": True},
    "dora, learned scale, dropout": {"use_dora": True, "learn_scaling": True, "lora_dropout": 0.3},
    "lora bias": {"lora_bias": True},
    "biases of the adapted": {"bias": "lora_only"},
    "dora and biases": {"use_dora": True, "bias": "lora_only"},
}


PRODUCTS = [slot for slot, settings in SLOTS.items() if not {"use_dora", "lora_bias", "bias"} & settings.keys()]

# Pairs without sense: what refuses them, as tests/core shows.
NO_SENSE = {
    ("embedding", "lora bias"): "refused: the file of an embedding has no place for it",
    **{
        (kind, slot): "refused: there is no bias to train"
        for kind in ("embedding", "linear without bias")
        for slot in ("biases of the adapted", "dora and biases")
    },
}
UNMERGEABLE = {("linear without bias", "lora bias"): "refused: there is no bias to merge into"}
# Where PEFT 0.21.2 is right in general, and fails in this slot: the update of a grouped weight is misshapen.
PEFT_FAILS = {
    (kind, slot)
    for kind in ("conv2d grouped", "conv1d depthwise")
    for slot, settings in SLOTS.items()
    if settings.get("use_dora")
}
PAIRS = [(kind, slot) for kind in KINDS for slot in SLOTS if (kind.name, slot) not in NO_SENSE]


QUANTIZED = [quantized(kind, base) for base in BASES for kind in KINDS if kind.name in base.kinds]
QUANTIZED_PAIRS = [(quantized(kind, base), slot) for base in BASES for kind, slot in PAIRS if kind.name in base.kinds]


def config(kind: KindCase, slot: str = "plain") -> LoRAConfig:
    return LoRAConfig(r=kind.r, lora_alpha=10, target_modules=["target"], **SLOTS[slot])


def trained(kind: KindCase, slot: str = "plain", dtype: torch.dtype = torch.float32) -> LoRAModel:
    """A model whose adapter does something, in eval mode."""
    model = LoRAModel(kind.net(dtype), config(kind, slot))
    stir(model)
    return model.eval()


def stir(model: LoRAModel, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in model.lora_layers.values():
        for name, parameter in layer.named_parameters():
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = (value + 1.5 if name in ("scaling", "lora_magnitude_vector") else value).to(
                parameter.dtype
            )
        if isinstance(layer, LoRALayer) and layer.kind is EMBEDDING:
            layer.lora_A.data[:, 0] = 0  # the padding id's column starts at zero and has no gradient
