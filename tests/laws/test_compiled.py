"""torch.compile in training: one graph, forward and backward; another adapter of equal shape compiles nothing anew."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LAYERS, SPECIAL_LAYERS, LayerCase, config, pairs_of
from tiny import stir
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from tailora import LoRAConfig, LoRAModel

NAMES = ("linear", "transformers conv1d", "embedding", "conv2d", "attention in", "part", "experts up")
CASES = [(case, slot) for case in [*LAYERS, *SPECIAL_LAYERS] if case.name in NAMES for slot in ("plain", "dora")]
CASES = [(case, slot) for case, slot in CASES if slot == "plain" or case not in SPECIAL_LAYERS]


class Counting:
    """A backend that keeps the graphs of the forwards and of the backwards that it was given."""

    def __init__(self) -> None:
        self.forwards, self.backwards = 0, 0
        self.backend = aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)

    def _forward(self, graph: Any, _: Any) -> Callable[..., Any]:
        self.forwards += 1
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    def _backward(self, graph: Any, _: Any) -> Callable[..., Any]:
        self.backwards += 1
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]


def two_adapters(base: nn.Module, settings: LoRAConfig) -> LoRAModel:
    model = LoRAModel(base, settings)
    model.add_adapter("other", settings)
    for seed, name in enumerate(("other", "default")):
        model.set_adapter(name)
        stir(model, seed)
    return model.train()


def gradients(model: nn.Module, call: Callable[[nn.Module], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    y = call(model)
    return [y.detach(), *torch.autograd.grad((y - 1).square().sum(), parameters)]


@pytest.mark.slow
@pairs_of(CASES, per_slot=1)
def test_a_step_is_one_graph_forward_and_one_backward_for_adapters_of_equal_shape(case: LayerCase, slot: str) -> None:
    torch._dynamo.reset()
    model, x = two_adapters(case.net(torch.float64), config(case, slot)), case.batch(torch.float64)
    counting = Counting()
    compiled: Any = torch.compile(model, fullgraph=True, backend=counting.backend)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        parameters = list(model.lora_layers.parameters())
        found, expected = (gradients(each, lambda net: net(x), parameters) for each in (compiled, model))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (counting.forwards, counting.backwards) == (1, 1)
