"""Initial values from weights and data, over every layer type: their effect, and what is refused."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import ALL_LAYERS, LAYERS, LayerCase, all_of
from tiny import chat_model
from torch import Tensor, nn

from tailora import LoRAConfig, LoRALayer, LoRAModel
from tailora.core.low_rank import EXACT
from tailora.errors import AdapterError, ConfigError, DataError, TargetError

every_layer = all_of(ALL_LAYERS)


def config(case: LayerCase, name: str, **changes: Any) -> LoRAConfig:
    return LoRAConfig(**{"r": case.r, **case.names, "init_lora_weights": name, **changes})


@every_layer
@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_initial_values_from_the_weight_compute_the_base_and_change_no_weight(
    case: LayerCase, name: str, dtype: torch.dtype
) -> None:
    model, x = LoRAModel(case.net(dtype), config(case, name)), case.batch(dtype)
    (layer,) = model.lora_layers.values()
    with (
        torch.no_grad()
    ):  # torch multiplies otherwise by a weight that requires a gradient; some CPUs then round so, too
        assert torch.equal(model(x), case.net(dtype).requires_grad_(False)(x))
    assert torch.equal(case.weight(model.base_model), case.weight(case.net(dtype)))
    assert layer.lora_A.any()
    assert layer.lora_B.any()
    assert layer.lora_A.dtype == torch.float32


@every_layer
def test_pissa_takes_the_best_part_of_the_weight_group_by_group(case: LayerCase) -> None:
    model = LoRAModel(case.net(), config(case, "pissa"))
    (layer,) = model.lora_layers.values()
    base = model.base_model.block["target"]
    weight = case.weight(model.base_model).detach()
    matrix = layer.layer_type.matrix(base, weight)  # (groups, m, n)
    own = matrix if layer.output_slice is None else layer.output_slice.take(matrix.mT).mT
    layer.start_A = layer.start_B = None
    left = (weight - layer.delta_weight(base)).square().sum() - (matrix.square().sum() - own.square().sum())
    tail = torch.linalg.svdvals(own)[:, layer.lora_B.shape[1] :]
    torch.testing.assert_close(left, tail.square().sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_initial_values_from_the_weight_do_not_depend_on_the_random_state(name: str) -> None:
    base = nn.Sequential(nn.Linear(EXACT + 60, EXACT + 90))

    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = LoRAModel(copy.deepcopy(base), LoRAConfig(r=4, init_lora_weights=name))
        return model.lora_layers["0"].state_dict()

    one, two = made(1), made(2)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_ids_and_groups_have_no_principal_components() -> None:
    for layer, reason in ((nn.Embedding(20, 12), "ids"), (nn.Conv1d(8, 8, 3, groups=2), "groups")):
        with pytest.raises(TargetError, match=reason):
            LoRAModel(nn.Sequential(layer), LoRAConfig(r=4, target_modules=["0"], init_lora_weights="eva"))


def test_pissa_of_a_zero_weight_is_zero() -> None:
    base = nn.Linear(12, 10)
    nn.init.zeros_(base.weight)
    layer = LoRAModel(nn.Sequential(base), LoRAConfig(r=4, init_lora_weights="pissa")).lora_layers["0"]
    assert isinstance(layer, LoRALayer)
    assert not layer.lora_B.any()


WHOLE = [case for case in LAYERS if case.shape and case.name not in ("conv1d depthwise", "conv2d grouped")]


@all_of(WHOLE)
def test_eva_explains_as_much_of_the_inputs_as_their_principal_components(case: LayerCase) -> None:
    model = LoRAModel(case.net(), config(case, "eva", r={8: 4, 6: 6}.get(case.r, 2)))
    model.start_from_data([case.batch(seed=seed) for seed in range(5)])
    (layer,) = model.lora_layers.values()
    base = model.base_model.block["target"]
    identity = torch.eye(layer.in_features).reshape(-1, *layer.lora_A.shape[1:])
    rows = []
    for seed in range(5):
        x = case.batch(seed=seed)
        patches = (
            layer.layer_type.update(base, x, identity, torch.eye(layer.in_features)) if x.ndim == len(case.shape) else x
        )
        channels = -1 if layer.lora_A.ndim == 2 else 1
        rows.append(patches.movedim(channels, -1).reshape(-1, layer.in_features))
    x = torch.cat(rows)
    S = torch.linalg.svdvals(x - x.mean(0))
    A = layer.lora_A.detach().flatten(1)
    torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=1e-4, atol=1e-4)
    explained = ((x - x.mean(0)) @ A.T).square().sum()
    torch.testing.assert_close(explained, S[: len(A)].square().sum(), rtol=1e-4, atol=1e-4)


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    ids = [torch.randint(0, 300, (2, 12)) for _ in range(5)]
    return [{"input_ids": each, "labels": each} for each in ids]


def language_model(name: str, **changes: Any) -> LoRAModel:
    model = LoRAModel(chat_model(), LoRAConfig(**{"r": 4, "init_lora_weights": name, **changes}))
    if name == "eva":
        model.start_from_data(batches())
    return model


PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 2}}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("pissa", PATTERNS), ("pissa", {"learn_scaling": True}), ("olora", {}), ("eva", PATTERNS)],
    ids=str,
)
@pytest.mark.slow
def test_peft_loads_every_initialisation_on_the_unmodified_base_and_writes_it_back(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model, ids = language_model(name, **changes), batches()[0]["input_ids"]
    for parameter in model.lora_layers.parameters():  # on from the start, as training goes
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.eval().save_adapter(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(chat_model(), str(tmp_path / "ours")).eval()
        theirs.save_pretrained(str(tmp_path / "theirs"))
    assert (model(ids).logits - chat_model().eval()(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=2e-5, atol=2e-5)
    for folder in ("ours", "theirs"):
        back = LoRAModel.from_pretrained(chat_model(), tmp_path / folder).eval()
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=2e-5, atol=2e-5)
    again = LoRAModel.from_pretrained(chat_model(), tmp_path / "ours")
    assert again.adapters == model.adapters
    if not changes.get("learn_scaling"):
        assert again.lora_layers.state_dict().keys() == model.lora_layers.state_dict().keys()
        for key, value in again.lora_layers.state_dict().items():
            assert torch.equal(value, model.lora_layers.state_dict()[key])


def test_uninitialised_memory_never_remains_in_a_start_from_data(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, ids = torch.empty, batches()[0]["input_ids"]
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(7))
    model = language_model("eva").eval()
    torch.testing.assert_close(model(ids).logits, chat_model().eval()(ids).logits)


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}], ids=str)
def test_a_model_that_waits_for_a_state_dict_computes_its_base(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, ids = torch.empty, batches()[0]["input_ids"]
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(7))
    model = LoRAModel(chat_model(), LoRAConfig(r=4, **settings), fresh=False).eval()
    torch.testing.assert_close(model(ids).logits, chat_model().eval()(ids).logits)


def test_an_adapter_that_waits_for_data_says_so_and_computes_the_base_until_then(tmp_path: Path) -> None:
    model, batch = LoRAModel(chat_model(), LoRAConfig(r=4, init_lora_weights="eva")), batches()[0]
    with pytest.raises(AdapterError, match=r"start_from_data\(batches\) first"):
        model.train()(**batch)
    with pytest.raises(AdapterError, match="start_from_data"):
        model.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert torch.equal(model.eval()(**batch).logits, chat_model().eval()(**batch).logits)
    with model.disable_adapter():
        model.train()(**batch)
    model.start_from_data(batches())
    model.train()(**batch).loss.backward()
    assert all(layer.lora_B.grad is not None for layer in model.lora_layers.values())


def test_unusable_data_is_refused_and_nothing_changes() -> None:
    model = language_model("kaiming")
    with pytest.raises(AdapterError, match="uses no data"):
        model.start_from_data(batches())
    model = LoRAModel(chat_model(), LoRAConfig(r=4, init_lora_weights="eva")).train()
    before = copy.deepcopy(model.lora_layers.state_dict())
    embedding = model.get_input_embeddings()
    for given, words in (([], "no batches to initialize from"), ([("ids", "labels")], "as batches, got tuple")):
        with pytest.raises(DataError, match=words):
            model.start_from_data(given)
    for factor, words in (
        (float("nan"), r"q_proj, .* \(14 in total\) contain NaN"),
        (0, r"\(14 in total\) are constant"),
    ):
        hook = embedding.register_forward_hook(lambda _, __, output, factor=factor: output * factor)
        with hook, pytest.raises(DataError, match=words):
            model.start_from_data(batches())
    with pytest.raises(ConfigError, match="rho"):
        model.start_from_data(batches(), rho=0.5)
    assert model.training
    assert model.active_adapters == ("default",)
    assert all(torch.equal(value, before[key]) for key, value in model.lora_layers.state_dict().items())


def test_a_start_from_data_is_the_same_every_time_and_leaves_no_gradient() -> None:
    one, two = language_model("eva"), language_model("eva")
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    assert all(parameter.grad is None for parameter in one.parameters())
    assert all(parameter.requires_grad for parameter in one.lora_layers.parameters())


def test_eva_keeps_the_sum_of_ranks_and_moves_none_with_rho_1() -> None:
    model = language_model("eva")
    ranks = [layer.r for layer in model.lora_layers.values()]
    assert sum(ranks) == 4 * len(ranks)
    assert len(set(ranks)) > 1
    assert all(layer.scaling.item() == 8 for layer in model.lora_layers.values())
    still = LoRAModel(chat_model(), LoRAConfig(r=4, init_lora_weights="eva"))
    still.start_from_data(batches(), rho=1)
    assert still.adapters["default"].rank_pattern == {}


def test_eva_gives_a_narrow_layer_no_more_ranks_than_it_can_have() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 6), nn.Linear(6, 30))
    base[0].weight.data[2:] = 0.01  # the second layer reads two directions, the first many
    model = LoRAModel(base, LoRAConfig(r=5, init_lora_weights="eva"))
    model.start_from_data([torch.randn(60, 24)])
    assert {path: layer.r for path, layer in model.lora_layers.items()} == {"0": 6, "1": 4}
