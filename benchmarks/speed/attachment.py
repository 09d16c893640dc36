"""Ways to attach an update to a layer: what one call costs, and what each leaves as it was.

    python -m benchmarks.speed.attachment           writes benchmarks/results/attachment.json

The ways are tailora's swapped class, a module that wraps the layer, a forward hook, and a parametrization of the
weight. All compute W x + s B A x for the same factors, on one linear layer in float32 without gradients, in turns.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks import measure
from tailora import LoRAConfig, LoRALayer, LoRAModel

WIDTH, RANK, TOKENS = 768, 16, (1, 16, 256)
CALLS, ROUNDS = 50, 30


class Wrapper(nn.Module):
    def __init__(self, layer: nn.Linear, update: LoRALayer) -> None:
        super().__init__()
        self.layer, self.update = layer, update

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.layer(x) + self.update(x)
        return added


class DenseUpdate(nn.Module):
    """A parametrization: the weight becomes W + s B A whenever it is read."""

    def __init__(self, update: LoRALayer) -> None:
        super().__init__()
        self.update = update

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.update.scaling * (self.update.lora_B @ self.update.lora_A)


def swapped_class(model: nn.Sequential, update: LoRALayer) -> nn.Module:
    adapted = LoRAModel(model, LoRAConfig(r=RANK, lora_alpha=RANK))
    layer = adapted.adapter().low_rank["0"]
    with torch.no_grad():
        layer.lora_A.copy_(update.lora_A)
        layer.lora_B.copy_(update.lora_B)
    return model


def wrapper(model: nn.Sequential, update: LoRALayer) -> nn.Module:
    model[0] = Wrapper(model[0], update)  # type: ignore[arg-type]
    return model


def forward_hook(model: nn.Sequential, update: LoRALayer) -> nn.Module:
    model[0].register_forward_hook(lambda _layer, inputs, output: output + update(inputs[0]))
    return model


def parametrization(model: nn.Sequential, update: LoRALayer) -> nn.Module:
    parametrize.register_parametrization(model[0], "weight", DenseUpdate(update))
    return model


WAYS: dict[str, Callable[[nn.Sequential, LoRALayer], nn.Module]] = {
    "swapped class": swapped_class,
    "wrapper": wrapper,
    "forward hook": forward_hook,
    "parametrization": parametrization,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"few calls, written to {measure.QUICK}")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, update = nn.Sequential(nn.Linear(WIDTH, WIDTH)), LoRALayer(WIDTH, WIDTH, rank=RANK, lora_alpha=RANK)
    nn.init.normal_(update.lora_B, std=0.02)
    models = {name: attach(copy.deepcopy(base), update).eval() for name, attach in WAYS.items()}
    results = {name: properties(base, model, WAYS[name], update) for name, model in models.items()}
    with torch.no_grad():
        for tokens in TOKENS:
            x = torch.randn(tokens, WIDTH)
            expected = models["wrapper"](x)
            for model in models.values():
                torch.testing.assert_close(model(x), expected)
            arms = {name: calls(model, x) for name, model in {"the layer alone": base, **models}.items()}
            times = measure.take_turns(arms, 2 if quick else ROUNDS, measure.clock_for(1))
            for name, ratio in measure.ratios(times, "the layer alone").items():
                results.setdefault(name, {})[str(tokens)] = ratio
    path = measure.QUICK / "attachment.json" if quick else measure.RESULTS / "attachment.json"
    measure.log(str(measure.write(path, {"width": WIDTH, "rank": RANK, "calls": CALLS, "ways": results})))


def calls(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        for _ in range(CALLS):
            model(x)

    return step


def properties(
    base: nn.Sequential, model: nn.Module, attach: Callable[[nn.Sequential, LoRALayer], nn.Module], update: LoRALayer
) -> dict[str, Any]:
    """Returns what the way leaves as it was, and whether a model that was compiled before takes part in it."""
    torch._dynamo.reset()
    later = copy.deepcopy(base).eval()
    compiled = torch.compile(later, backend="eager")
    x = torch.randn(1, WIDTH)
    with torch.no_grad():
        before = compiled(x)
        attach(later, update)
        is_seen = not torch.equal(compiled(x), before)
    return {
        "is a Linear": isinstance(model[0], nn.Linear),  # type: ignore[index]
        "same state dict": list(model.state_dict()) == list(base.state_dict()),
        "works after torch.compile": is_seen,
    }


if __name__ == "__main__":
    main()
