"""A frozen base keeps the running statistics of its normalisations: an adapter computes the same when loaded."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.core.attach import evaluating


class Net(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 6), norm(), nn.Linear(6, 3)
        self.head = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        y = self.norm(y.T[None])[0].T if isinstance(self.norm, nn.InstanceNorm1d) else self.norm(y)
        return self.head(self.last(y))


def batch_norm() -> nn.Module:
    return nn.BatchNorm1d(6)


def train(model: LoRAModel, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=1e-2)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    for _ in range(steps):
        model(torch.randn(8, 4, generator=generator) + 3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": batch_norm,
    "InstanceNorm": lambda: nn.InstanceNorm1d(6, track_running_stats=True),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(6),
}
MODES: dict[str, Callable[[LoRAModel], Any]] = {
    "model.train()": lambda model: model.train(),
    "base_model.train()": lambda model: model.base_model.train(),
    "a child's train()": lambda model: model.train().norm.train(),
    "train after eval": lambda model: model.eval().train(),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_training_leaves_the_base_as_it_is_and_the_adapter_comes_back_the_same(
    norm: Callable[[], nn.Module], mode: Callable[[LoRAModel], Any], tmp_path: Path
) -> None:
    model, x = LoRAModel(Net(norm), LoRAConfig(r=2, target_modules=["first", "last"])), torch.randn(5, 4)
    mode(model)
    train(model)
    for name, value in Net(norm).state_dict().items():
        assert torch.equal(model.base_model.state_dict()[name], value), name
    model.save_adapter(tmp_path)
    loaded = LoRAModel.from_pretrained(Net(norm), tmp_path).eval()
    assert torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize("adapted", ["0", "1"])
@pytest.mark.parametrize("spectral_norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
def test_spectral_norm_keeps_its_vectors(spectral_norm: Any, adapted: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)).eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    train(LoRAModel(base, LoRAConfig(r=2, target_modules=[adapted])).train())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("saved", ["head", "norm"])
def test_modules_to_save_have_statistics_of_their_own_that_are_saved(saved: str, tmp_path: Path) -> None:
    config = LoRAConfig(r=2, target_modules=["first", "last"], modules_to_save=[saved])
    model, x = LoRAModel(Net(batch_norm), config).train(), torch.randn(5, 4)
    train(model)
    base = Net(batch_norm).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in model.base_model.state_dict().items())
    copy_of_it: Any = model.adapter().saved[saved]
    trained = copy_of_it if saved == "norm" else copy_of_it[0]
    assert type(trained) is nn.BatchNorm1d
    assert trained.num_batches_tracked == 3
    model.save_adapter(tmp_path)
    loaded = LoRAModel.from_pretrained(Net(batch_norm), tmp_path).eval()
    assert torch.equal(loaded(x), model.eval()(x))
    with model.train().disable_adapter():
        model(x)
    assert all(torch.equal(value, base[name]) for name, value in model.base_model.state_dict().items())
    expected = model.eval()(x)
    torch.testing.assert_close(model.merge_and_unload().eval()(x), expected)


def test_a_trained_bias_of_a_normalisation_keeps_its_statistics_frozen() -> None:
    model = LoRAModel(Net(batch_norm), LoRAConfig(r=2, target_modules=["first"]))
    model.add_adapter("b", LoRAConfig(r=2, target_modules=["first"], bias="all"))
    model.set_adapter("b")
    train(model.train())
    assert model.lora_layers["norm"].bias.abs().sum() > 0
    assert model.norm.num_batches_tracked == 0
    model.delete_adapter("b")
    model.set_adapter("default")
    train(model)
    assert model.norm.num_batches_tracked == 0


def test_unload_gives_back_class_and_mode() -> None:
    model = LoRAModel(Net(batch_norm), LoRAConfig(r=2, target_modules=["first"])).train()
    assert not model.norm.training
    assert isinstance(model.norm, nn.BatchNorm1d)
    with evaluating(model):
        pass
    base = model.unload()
    assert type(base.norm) is nn.BatchNorm1d
    assert base.norm.training
    base(torch.randn(8, 4))
    assert base.norm.num_batches_tracked == 1


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_frozen_too(copied: Callable[[LoRAModel], LoRAModel], bias: Any) -> None:
    model = copied(LoRAModel(Net(batch_norm), LoRAConfig(r=2, target_modules=["first"], bias=bias)).train())
    train(model)
    assert model.norm.num_batches_tracked == 0
    assert type(model.unload().norm) is nn.BatchNorm1d


@pytest.mark.slow
def test_a_compiled_model_is_frozen_too() -> None:
    model = LoRAModel(Net(batch_norm), LoRAConfig(r=2, target_modules=["first"])).train()
    x = torch.randn(8, 4)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    assert model.norm.num_batches_tracked == 0
