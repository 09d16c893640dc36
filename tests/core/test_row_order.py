"""A different adapter for each row in layers whose input has no dimension for the rows."""

from typing import Any, cast

import pytest
import torch
from tiny import stir, tiny_model
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.errors import RowsError


def with_two_adapters(base: nn.Module) -> LoRAModel:
    targets: dict[str, Any] = {"target_modules": r".*(_proj|fc.|router.gate)"}
    model = LoRAModel(base, LoRAConfig(r=2, **targets), adapter_name="a")
    model.add_adapter("b", LoRAConfig(r=3, **targets))
    for seed, name in enumerate(("a", "b")):
        model.set_adapter(name)
        stir(model, seed)
    return model


@pytest.mark.parametrize("class_name", ["Qwen2MoeForCausalLM", "AfmoeForCausalLM", "OPTForCausalLM"])
def test_each_row_has_its_adapter(class_name: str) -> None:
    model = with_two_adapters(tiny_model(class_name)).train()
    ids, names = torch.randint(0, 40, (3, 7)), ["b", None, "a"]
    factors = [factor for part in model._adapter_set["a"].low_rank.values() for factor in part.parameters()]
    with model.adapter_rows(names):
        together = model(ids).logits
        gradients = torch.autograd.grad(together.square().sum(), factors)
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
        before = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        with torch.no_grad():  # as if it were trained in between
            for part in model.adapter("b").low_rank.values():
                part.lora_B.add_(torch.randn_like(part.lora_B))
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert not torch.equal(together[:1, : before.shape[1]], before[:1, : together.shape[1]])
    for row, name in enumerate(names):
        model.set_adapter(name)
        own = ids[row : row + 1]
        alone = model.generate(own, attention_mask=torch.ones_like(own), **settings)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


class Routed(nn.Module):
    """Gives its layers the tokens of even ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.shared_expert, self.expert = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.expert(self.shared_expert(self.embeddings(ids)[ids % 2 == 0])))


@pytest.mark.parametrize("name", ["expert", "shared_expert"])
def test_a_layer_that_gets_a_part_of_the_tokens_is_refused(name: str) -> None:
    model = LoRAModel(Routed(), LoRAConfig(r=2, target_modules=[name]), "a")
    model.add_adapter("b", LoRAConfig(r=3, target_modules=[name]))
    whole, balanced = torch.full((2, 4), 2), torch.tensor([[1, 2, 3, 4], [2, 4, 5, 7]])  # 4 of 8 tokens, 2 of each row
    with model.adapter_rows(["a", "b"]):
        if name == "shared_expert":
            assert model(whole).shape == (8, 6)
        else:  # which might get the tokens in any order
            with pytest.raises(RowsError, match=r"expert: expected 2 rows, .* got \(8, 6\)"):
                model(whole)
        for ids in (balanced, torch.tensor([[2, 2, 2, 1], [1, 1, 1, 2]])):
            with pytest.raises(RowsError, match=r"expert: expected 2 rows, .* got \(4, 6\)"):
                model(ids)
    with model.adapter_rows(["a", "b", "a", "b"]), pytest.raises(RowsError, match=r"expected 4 rows, .* \(8, 6\)"):
        model(whole)
    with model.adapter_rows(["a"]):  # all tokens are of one row
        assert model(whole[:1]).shape == (4, 6)


def test_inputs_without_embeddings_are_refused() -> None:
    model = with_two_adapters(tiny_model("Qwen2MoeForCausalLM"))
    ids = torch.randint(0, 40, (2, 5))
    embedded = model.base_model.get_input_embeddings()(ids)  # type: ignore[operator]
    with model.adapter_rows(["a", "b"]):
        with pytest.raises(RowsError):  # how many tokens a row has is not known
            model(inputs_embeds=embedded)
        assert model(ids).logits.isfinite().all()


def test_a_model_whose_input_embedding_is_a_parameter() -> None:
    base = tiny_model("PerceiverForSequenceClassification")
    model = LoRAModel(base, LoRAConfig(r=2, target_modules=["query"]), "a")
    ids = torch.randint(3, 40, (2, 5))
    assert isinstance(base.get_input_embeddings(), nn.Parameter)
    with model.adapter_rows(["a", None]):
        assert model(ids).logits.shape == (2, 2)
