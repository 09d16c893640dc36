"""A different adapter for each row in layers whose input has no dimension for the rows."""

from typing import Any, cast

import pytest
import torch
from tiny import stir, tiny_model
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.errors import RowsError

TARGETS: dict[str, Any] = {"exclude_modules": ["shared_expert_gate"]}  # has one output


def with_two_adapters(base: nn.Module) -> LoRAModel:
    model = LoRAModel(base, LoRAConfig(r=2, **TARGETS), adapter_name="a")
    model.add_adapter("b", LoRAConfig(r=3, **TARGETS))
    for seed, name in enumerate(("a", "b")):
        model.set_adapter(name)
        stir(model, seed)
    return model


class SharedExpert(nn.Module):
    """Gives its layer all tokens in one dimension: row after row, token after token of all rows, or in reverse."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.embeddings, self.expert, self.order = nn.Embedding(9, 6), nn.Linear(6, 6), order

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)  # (rows, tokens, 6)
        if self.order == "by token":
            x = x.transpose(0, 1)
        elif self.order == "reversed":
            x = x.flip(0)
        return cast(Tensor, self.expert(x.reshape(-1, 6)))


def test_each_row_of_a_shared_expert_has_its_adapter() -> None:
    model = with_two_adapters(tiny_model("Qwen2MoeForCausalLM")).train()
    ids, names = torch.randint(0, 40, (3, 7)), ["b", None, "a"]
    factors = [factor for part in model._adapter_set["a"].low_rank.values() for factor in part.parameters()]
    calls = list[Any]()
    handle = model.base_model.register_forward_hook(lambda *_: calls.append(None))
    for repetition in range(2):
        with model.adapter_rows(names):
            together = model(ids).logits
            gradients = torch.autograd.grad(together.square().sum(), factors)
        assert len(calls) == 2 + repetition  # the order is found once
    handle.remove()
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model(ids[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone)
        if name == "a":
            expected = torch.autograd.grad(alone.square().sum(), factors)
            torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_a_shared_expert_generates_with_an_adapter_for_each_row() -> None:
    model = with_two_adapters(tiny_model("Qwen2MoeForCausalLM")).eval()
    ids, names, settings = (
        torch.randint(3, 40, (2, 5)),
        ["b", "a"],
        {"max_new_tokens": 4, "pad_token_id": 0, "num_beams": 2},
    )
    with model.adapter_rows(names):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for row, name in enumerate(names):
        model.set_adapter(name)
        own = ids[row : row + 1]
        alone = model.generate(own, attention_mask=torch.ones_like(own), **settings)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


@pytest.mark.parametrize("order", ["by row", "by token", "reversed"])
def test_rows_in_another_order_are_refused(order: str) -> None:
    model = LoRAModel(SharedExpert(order), LoRAConfig(r=2), "a")
    model.add_adapter("b", LoRAConfig(r=3))
    ids = torch.randint(0, 9, (3, 4))
    with model.adapter_rows(["a", "b", None]):
        if order == "by row":
            assert model(ids).shape == (12, 6)
        else:
            with pytest.raises(RowsError, match=r"expert: expected 3 rows, .* got \(12, 6\)"):
                model(ids)


class Routed(SharedExpert):
    """Gives its layer the tokens of even ids, so that one batch can reach it whole and another in part."""

    def forward(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.expert(self.embeddings(ids)[ids % 2 == 0]))


def test_a_layer_that_gets_a_part_of_the_tokens_is_refused_whatever_it_got_before() -> None:
    model = LoRAModel(Routed("by row"), LoRAConfig(r=2), "a")
    model.add_adapter("b", LoRAConfig(r=3))
    whole, balanced = torch.full((2, 4), 2), torch.tensor([[1, 2, 3, 4], [2, 4, 5, 7]])  # 4 of 8 tokens, 2 of each row
    with model.adapter_rows(["a", "b"]):
        assert model(whole).shape == (8, 6)
        for ids in (balanced, torch.tensor([[2, 2, 2, 1], [1, 1, 1, 2]])):
            with pytest.raises(RowsError, match=r"expert: expected 2 rows, .* got \(4, 6\)"):
                model(ids)


def test_what_one_call_does_not_show_the_next_one_does() -> None:
    model = with_two_adapters(tiny_model("Qwen2MoeForCausalLM"))
    ids = torch.randint(0, 40, (2, 5))
    with model.adapter_rows(["a", "b"]):
        with pytest.raises(RowsError):  # the embeddings are not called, so nothing can be marked
            model(inputs_embeds=model.base_model.get_input_embeddings()(ids))  # type: ignore[operator]
        assert model(ids).logits.isfinite().all()


def test_adapters_that_are_added_after_unloading_have_their_own_layers() -> None:
    model = LoRAModel(tiny_model("Qwen2MoeForCausalLM"), LoRAConfig(r=2, target_modules=["q_proj"]), "a")
    model.unload()
    config = LoRAConfig(r=2, target_modules=["shared_expert.up_proj"])
    for name in ("b", "c"):
        model.add_adapter(name, config)
    with model.adapter_rows(["b", "c"]):
        assert model(torch.randint(0, 40, (2, 5))).logits.isfinite().all()


def test_a_model_whose_input_embedding_is_a_parameter() -> None:
    base = tiny_model("PerceiverForSequenceClassification")
    model = LoRAModel(base, LoRAConfig(r=2, target_modules=["query"]), "a")
    ids = torch.randint(3, 40, (2, 5))
    assert isinstance(base.get_input_embeddings(), nn.Parameter)
    with model.adapter_rows(["a", None]):
        assert model(ids).logits.shape == (2, 2)
