"""Combining, shrinking and extracting on whole models: several layers, modules trained in full, what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_model, stir, stirred_model
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.core.low_rank import nearest_for_energy, nearest_of_rank, rank_for_energy
from tailora.core.patterns import by_pattern, portable_patterns
from tailora.errors import AdapterError, BaseMismatchError, ConfigError, DivergedError, MergeError, TargetError


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).to(dtype)


def two(**of_b: Any) -> LoRAModel:
    """a adapts both layers; b, as given, the last one at rank 3 with rsLoRA."""
    model = stirred_model(net(), LoRAConfig(r=2, lora_dropout=0.1), "a")
    model.add_adapter("b", LoRAConfig(**{"r": 3, "target_modules": ["2"], "use_rslora": True, **of_b}))
    model.set_adapter("b")
    stir(model, seed=7)
    return model.eval()


def delta(model: LoRAModel, name: str, path: str) -> Tensor:
    return model.adapter(name).low_rank[path].delta_weight().detach()


def test_adapters_of_other_layers_are_combined_where_they_are(tmp_path: Path) -> None:
    model, x = two(), torch.randn(3, 8, dtype=torch.float64)
    model.combine({"a": 0.5, "b": -2}, name="mix")
    torch.testing.assert_close(delta(model, "mix", "0"), 0.5 * delta(model, "a", "0"))
    torch.testing.assert_close(delta(model, "mix", "2"), 0.5 * delta(model, "a", "2") - 2 * delta(model, "b", "2"))
    model.set_adapter("mix")
    rows = {row.path: (row.r, row.lora_alpha) for row in model.summary().rows}
    assert rows == {"0": (2, 2), "2": (5, 5)}
    loaded = LoRAModel.from_pretrained(net(), model.save_adapter(tmp_path, "mix")).eval()
    torch.testing.assert_close(loaded(x), model(x))


def test_tied_modules_stay_tied_and_layers_can_be_called_by_keyword() -> None:
    tied = ["embed_tokens", "lm_head"]
    model = stirred_model(chat_model(tie_word_embeddings=True), LoRAConfig(r=2, modules_to_save=tied), "a")
    model.combine({"a": 1}, name="same")
    embedding, head = (model.adapter("same").saved[path] for path in ("model.embed_tokens", "lm_head"))
    assert embedding.weight is head.weight
    layer: Any = model.base_model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(input=x), layer(x))


def test_a_combination_shares_nothing_with_its_sources() -> None:
    model = two()
    before = delta(model, "a", "2")
    model.combine({"a": 1}, name="copy")
    model.set_adapter("copy")
    for parameter in model.lora_layers.parameters():
        assert parameter.requires_grad
        parameter.data.zero_()
    assert torch.equal(delta(model, "a", "2"), before)


def test_modules_trained_whole_are_copied_and_combined_where_that_is_exact() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    model = stirred_model(net(), LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"]), "a")
    model.add_adapter("b", LoRAConfig(r=2, target_modules=["0"]))
    base = net()[2].weight
    trained = model.adapter("a").saved["2"].weight
    model.combine({"a": 0.25, "b": 1}, name="mix")
    torch.testing.assert_close(model.adapter("mix").saved["2"].weight, base + 0.25 * (trained - base))
    assert model.adapters["mix"].modules_to_save == ["2"]
    model.combine({"a": 1}, name="same")
    model.shrink("a", "shrunk", energy=1.0)
    expected = model(x)
    for name in ("same", "shrunk"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), expected)
        assert model.adapter(name).saved["2"] is not model.adapter("a").saved["2"]


def nested() -> nn.ModuleDict:
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    return nn.ModuleDict({"block": block, "last": nn.Linear(8, 8)})


def test_a_module_that_is_not_linear_in_its_weights_is_combined_with_no_other() -> None:
    model = LoRAModel(nested(), LoRAConfig(r=2, target_modules=["last"], modules_to_save=["block"]), adapter_name="a")
    model.combine({"a": 1}, name="copy")
    with pytest.raises(AdapterError, match=r"block, trained in full by 'a', is a Sequential, which is not linear"):
        model.combine({"a": 0.5}, name="half")
    assert list(model.adapters) == ["a", "copy"]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown name": ({"weights": {"c": 1}}, AdapterError, "unknown adapter 'c'; existing adapters: a, b"),
    "taken name": ({"name": "a"}, AdapterError, "'a' already exists"),
    "no adapters": ({"weights": {}}, ConfigError, "nothing to combine"),
    "all zero": ({"weights": {"a": 0, "b": 0.0}}, ConfigError, "nothing to combine"),
    "nan": ({"weights": {"a": math.nan}}, ConfigError, "expected finite numbers as weights, got 'a' = nan"),
    "not a number": ({"weights": {"a": "much"}}, ConfigError, "got 'a' = 'much'"),
    "method": ({"method": "tie"}, ConfigError, "method = 'tie': input should be 'cat', 'svd', 'ties' or 'dare'"),
    "rank of cat": ({"r": 4}, ConfigError, "r = 4 has no effect with method 'cat', only with svd, ties, dare"),
    "rank 0": ({"r": 0, "method": "svd"}, ConfigError, "r = 0: input should be greater than or equal to 1"),
    "half a rank": ({"r": 1.5, "method": "svd"}, ConfigError, "r = 1.5"),
    "density": ({"density": 0, "method": "ties"}, ConfigError, "density = 0: input should be greater than 0"),
    "drop": ({"drop": 1, "method": "dare"}, ConfigError, "drop = 1: input should be less than 1"),
    "another's": ({"drop": 0.5, "method": "ties"}, ConfigError, "drop = 0.5 has no effect with method 'ties'"),
    "two at once": ({"r": 0, "method": "x"}, ConfigError, "2 problems"),
}


@pytest.mark.parametrize(("given", "error", "message"), BAD.values(), ids=BAD)
def test_invalid_settings_of_combine_are_refused_and_change_nothing(
    given: Any, error: type[Exception], message: str
) -> None:
    model = two()
    with pytest.raises(error, match=message):
        model.combine(**{"weights": {"a": 1, "b": 1}, "name": "mix", **given})
    assert list(model.adapters) == ["a", "b"]
    assert model.active_adapters == ("b",)


def test_a_sum_that_float32_cannot_hold_is_refused() -> None:
    model = stirred_model(net(torch.float32), LoRAConfig(r=2), "a")
    with pytest.raises(AdapterError, match=r"not finite at 0, 2 \(2 in total\); use smaller weights"):
        model.combine({"a": 1e300}, "mix")
    assert list(model.adapters) == ["a"]


def test_nothing_is_combined_or_shrunk_while_merged() -> None:
    model = two()
    model.merge()
    with pytest.raises(MergeError, match="cannot combine adapters while merged"):
        model.combine({"a": 1}, name="mix")
    with pytest.raises(MergeError, match="cannot shrink an adapter while merged"):
        model.shrink("a", "small", r=1)


def test_adapters_that_cannot_be_active_together_cannot_be_combined() -> None:
    model = LoRAModel(nested(), LoRAConfig(r=2, target_modules=["block.2"]), adapter_name="a")
    model.add_adapter("b", LoRAConfig(r=2, target_modules=["last"], modules_to_save=["block"]))
    with pytest.raises(AdapterError, match=r"b trains block in full, and a adapts block\.2"):
        model.combine({"a": 1, "b": 1}, name="mix")


# ---- shrinking


def test_the_matrices_of_an_attention_get_the_same_rank_because_files_have_one(tmp_path: Path) -> None:
    def base() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"attn": nn.MultiheadAttention(12, 4)}).double()

    model = stirred_model(base(), LoRAConfig(r=4, target_modules=["attn"]), "a")
    model.lora_layers["attn/out_proj"].lora_B.data[:, 1:] = 0
    report = model.shrink("a", "small", energy=1.0)
    assert report.rank == {"attn.in_proj_weight": 4, "attn.out_proj": 4}
    loaded = LoRAModel.from_pretrained(base(), model.save_adapter(tmp_path, "small"))
    for path in report.rank:
        torch.testing.assert_close(delta(loaded, "default", path), delta(model, "a", path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either r or energy, got none"),
        ({"r": 2, "energy": 0.9}, "got both"),
        ({"r": 0}, "for r, got 0"),
        ({"r": True}, "for r, got True"),
        ({"energy": 1.1}, "for energy, got 1.1"),
        ({"energy": math.nan}, "for energy, got nan"),
    ],
)
def test_exactly_one_valid_way_to_shrink_is_taken(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        two().shrink("a", "small", **given)


# ---- extracting


def test_extracting_reports_what_an_adapter_cannot_hold() -> None:
    tuned = net()
    with torch.no_grad():
        tuned[0].weight += torch.outer(torch.arange(12.0), torch.arange(8.0)).double() * 0.01
        tuned[0].bias += 0.5
    model, report = LoRAModel.from_difference(net(), tuned, r=3)
    assert report.rank == {"0": 3}
    assert report.worst < 1e-10
    start = net()[0].bias.detach()
    expected = float((tuned[0].bias.detach() - start).norm() / start.norm())
    assert report.left_over == {"0.bias": pytest.approx(expected)}
    assert list(model.adapters) == ["default"]
    whole, report = LoRAModel.from_difference(
        net(), tuned, LoRAConfig(target_modules=["2", "0"], exclude_modules=["2"]), energy=0.99
    )
    assert report.rank == {"0": 1}
    assert whole.adapters["default"].r == 1


def test_extracting_a_part_reports_the_other_rows_of_its_layer() -> None:
    def base() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"qkv": nn.Linear(12, 18)})

    parts = {"fused_parts": {"qkv": {"q": 6, "k": 6, "v": 6}}}
    tuned = stirred_model(base(), LoRAConfig(r=2, target_modules=["qkv.q", "qkv.v"], **parts)).merge_and_unload()
    _, report = LoRAModel.from_difference(base(), tuned, LoRAConfig(target_modules=["qkv.q"], **parts), r=2)
    before, after = base()["qkv"].weight.detach(), tuned["qkv"].weight.detach()
    lost = (after - before)[6:].norm() / before.norm()
    assert report.left_over["qkv.weight"] == pytest.approx(float(lost))
    assert report.worst < 1e-5


def test_a_tuned_language_model_comes_back_with_its_norms_and_embedding(tmp_path: Path) -> None:
    ids, tuned = torch.arange(24).view(2, 12), chat_model()
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "q_proj" in name or "norm" in name or "embed" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    plain, report = LoRAModel.from_difference(chat_model(), tuned, energy=1.0)
    assert set(report.rank) == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
    assert all("norm" in name or "embed" in name for name in report.left_over)
    assert len(report.left_over) == 6
    assert (plain(ids).logits - tuned(ids).logits).abs().max() > 0.01

    names = ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"]
    model, report = LoRAModel.from_difference(chat_model(), tuned, LoRAConfig(modules_to_save=names), energy=1.0)
    assert report.left_over == {}
    torch.testing.assert_close(model(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)
    again = LoRAModel.from_pretrained(chat_model(), model.save_adapter(tmp_path))
    torch.testing.assert_close(again(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)


def test_models_of_different_shapes_are_refused_in_one_error() -> None:
    with pytest.raises(BaseMismatchError, match="problems") as caught:
        LoRAModel.from_difference(chat_model(), chat_model(intermediate_size=96, num_hidden_layers=3), r=2)
    message = str(caught.value)
    assert (
        "model.layers.0.mlp.up_proj.weight has shape (96, 32) in the tuned model, but (64, 32) in the base" in message
    )
    assert "model.layers.2.mlp.up_proj.weight has shape (96, 32) in the tuned model, but None in the base" in message


def test_what_cannot_be_extracted_is_refused() -> None:
    broken = net()
    broken[0].weight.data[0, 0] = math.nan
    with pytest.raises(DivergedError, match="0: the difference between the two weights contains NaN or infinity"):
        LoRAModel.from_difference(net(), broken, r=2)
    with pytest.raises(AdapterError, match="no selected layer differs"):
        LoRAModel.from_difference(net(), net(), r=2)
    with pytest.raises(TargetError, match="already has tailora adapters"):
        LoRAModel.from_difference(net(), two(), r=2)
    with pytest.raises(ConfigError, match="either r or energy"):
        LoRAModel.from_difference(net(), broken)


# ---- the parts


@pytest.mark.slow
def test_a_large_matrix_is_cut_near_the_optimum_and_leaves_the_random_state_alone() -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    matrix = torch.randn(1, 700, 600, generator=generator) / 30
    matrix += torch.randn(1, 700, 8, generator=generator) @ torch.randn(1, 8, 600, generator=generator)
    state = torch.get_rng_state()
    _, error = nearest_of_rank(matrix, 16)
    assert torch.equal(torch.get_rng_state(), state)
    values = torch.linalg.svdvals(matrix)
    best = float(values[:, 16:].norm() / values.norm())
    assert best * (1 - 1e-5) <= error < 1.001 * best
    for energy in (0.9, 0.99, 1.0):
        factors, error = nearest_for_energy(matrix, energy)
        shares = values.double().square().sum(0).cumsum(0) / values.double().square().sum()
        assert factors.A.shape[1] == 1 + int((shares[:-1] < energy).sum())
        assert error**2 <= 1 - energy + 1e-6


def test_patterns_give_every_path_its_own_value() -> None:
    values = {"0": 3, "block.0": 4, "a.q_proj": 8, "b.q_proj": 8, "c.q_proj": 2, "c.a.q_proj": 8, "v": 5, "w": 8}
    patterns = portable_patterns(values, 8)
    assert {path: by_pattern(path, patterns, 8) for path in values} == values
    assert len(patterns) == 4


def test_an_energy_that_a_rank_reaches_exactly_takes_no_more_ranks() -> None:
    S = torch.tensor([[2.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]])  # of two groups: squares 4, 2, 2, 0 of 8
    assert [rank_for_energy(S, energy) for energy in (0.4, 0.5, 0.6, 0.75, 0.8, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_for_energy(S[:, :2], 0.5, total=16.0) == 2


@pytest.mark.parametrize("method", ["svd", "ties", "dare"])
def test_a_combination_has_the_highest_rank_of_its_sources_unless_told_otherwise(method: str) -> None:
    model = two()
    report = model.combine({"a": 1, "b": 1}, "mix", method=method)
    assert report.rank == {"0": 2, "2": 3}
    assert model.adapter("mix").low_rank["2"].lora_A.shape == (3, 12)


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"bias": "lora_only"}], ids=str)
def test_a_smaller_adapter_adds_the_same_to_the_bias(settings: Any) -> None:
    """Its scale is 1, so that the bias takes in the scale of the source, which is 4."""
    model, zeros = LoRAModel(net(), LoRAConfig(r=2, lora_alpha=8, **settings)), torch.zeros(1, 8, dtype=torch.float64)
    stir(model)
    first = model.base_model[0]
    expected = first(zeros)
    model.shrink("default", "small", r=1)
    model.set_adapter("small")
    assert model.adapter("small").low_rank["0"].scaling == 1
    torch.testing.assert_close(first(zeros), expected)
    assert not torch.allclose(first(zeros), net()[0](zeros))
