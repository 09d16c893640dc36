"""What is trained beside low-rank updates: biases of all layers, rows of embeddings, tied modules in full."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import chat_model, stir, stirred_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.core.attach import Swapped
from tailora.errors import AdapterError, BaseMismatchError, FormatError, MergeError, TargetError

pytestmark = pytest.mark.filterwarnings("ignore")  # those of PEFT

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


class Mixed(nn.Module):
    """Every class whose bias is added to its output, and one adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.batch = nn.BatchNorm1d(6)
        self.group = nn.GroupNorm(2, 6)
        self.target = nn.Linear(8, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.target(self.group(self.batch(self.conv(x)).relu()))))
        return y


def mixed() -> nn.Module:
    torch.manual_seed(0)
    model = Mixed()
    model(torch.randn(16, 4, 8))  # statistics of the batch norm
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return model.eval()


def llama(tied: bool, vocabulary: int = 24) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=20, tie_word_embeddings=tied)
    model = LlamaForCausalLM(settings)
    if vocabulary > 20:  # new words
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()


def vectors() -> Tensor:
    return torch.randn(3, 4, 8, generator=torch.Generator(torch.get_default_device()).manual_seed(1))


def ids() -> Tensor:
    return torch.arange(2 * 12).view(2, 12)


ROWS = {"trainable_token_indices": [23, 3, 20]}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "all biases": (mixed, vectors, {"bias": "all"}),
    "all biases and dora": (mixed, vectors, {"bias": "all", "use_dora": True}),
    "rows": (lambda: llama(False), ids, ROWS),
    "rows by name": (lambda: llama(False), ids, {"trainable_token_indices": {"embed_tokens": [0, 22]}}),
    "rows, tied head": (lambda: llama(True), ids, ROWS),
    "rows, tied head and dora": (lambda: llama(True), ids, {**ROWS, "use_dora": True}),
}
cases = pytest.mark.parametrize(("base", "batch", "settings"), CASES.values(), ids=CASES)
COMPILED = ("all biases and dora", "rows, tied head and dora")  # by default; the others with -m exhaustive
Base, Batch, Settings = Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]


def targets(base: nn.Module) -> list[str]:
    return ["target"] if isinstance(base, Mixed) else ["q_proj"]


def adapted(base: Base, settings: Settings) -> LoRAModel:
    plain = base()
    return LoRAModel(plain, LoRAConfig(r=2, lora_alpha=4, target_modules=targets(plain), **settings)).eval()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y: Any = model(x)
    return y if isinstance(y, Tensor) else y.logits


@cases
def test_a_fresh_adapter_computes_the_base_and_training_moves_it_alone(
    base: Base, batch: Batch, settings: Settings
) -> None:
    model, x = adapted(base, settings), batch()
    assert torch.equal(logits(model, x), logits(base(), x))
    before = copy.deepcopy(model.base_model.state_dict())
    parameters = dict(model.lora_layers.named_parameters())
    start = {name: parameter.clone() for name, parameter in parameters.items()}
    optimizer, losses = torch.optim.AdamW(parameters.values(), lr=1e-2), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (logits(model, x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name, value in parameters.items() if torch.equal(value, start[name])] == []
    assert all(torch.equal(value, before[name]) for name, value in model.base_model.state_dict().items())
    assert model.summary().trainable_parameters == sum(value.numel() for value in parameters.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COMPILED else pytest.mark.exhaustive) for name in CASES]
)
@pytest.mark.slow
def test_compiled_it_computes_the_same(name: str) -> None:
    base, batch, settings = CASES[name]
    model, x = adapted(base, settings), batch()
    stir(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, x), logits(model, x))


@cases
def test_merged_copied_and_read_again_it_computes_the_same(
    base: Base, batch: Batch, settings: Settings, tmp_path: Path
) -> None:
    model, x = adapted(base, settings), batch()
    stir(model)
    expected = logits(model, x)
    assert (expected - logits(base(), x)).abs().max() > 0.05
    weights = copy.deepcopy(model.base_model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(twin, x), expected)
        for parameter in twin.lora_layers.parameters():
            parameter.data.zero_()
        torch.testing.assert_close(logits(model, x), expected)
    with model.merged():
        torch.testing.assert_close(logits(model, x), expected, **TOLERANCE)
        if isinstance(model.base_model, LlamaForCausalLM):
            tied = model.base_model.lm_head.weight is model.base_model.model.embed_tokens.weight
            assert tied == model.base_model.config.tie_word_embeddings
    assert all(torch.equal(value, weights[name]) for name, value in model.base_model.state_dict().items())
    model.save_adapter(tmp_path / "one")
    loaded = LoRAModel.from_pretrained(base(), tmp_path / "one").eval()
    torch.testing.assert_close(logits(loaded, x), expected)
    assert loaded.adapters == model.adapters
    loaded.save_adapter(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    with model.disable_adapter():
        assert torch.equal(logits(model, x), logits(base(), x))
    model.set_scale("default", 0)
    torch.testing.assert_close(logits(model, x), logits(base(), x))
    plain = model.unload()
    assert not any(isinstance(module, Swapped) for module in plain.modules())
    assert torch.equal(logits(plain, x), logits(base(), x))


@cases
def test_peft_reads_it_and_writes_the_same(base: Base, batch: Batch, settings: Settings, tmp_path: Path) -> None:
    model, x = adapted(base, settings), batch()
    stir(model)
    model.save_adapter(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(theirs, x), logits(model, x), **TOLERANCE)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in others.items()}
    back = LoRAModel.from_pretrained(base(), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(back, x), logits(model, x), **TOLERANCE)


@pytest.mark.parametrize("names", [["embed_tokens", "lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_of_a_grown_vocabulary_is_trained_whole(names: list[str], tied: bool, tmp_path: Path) -> None:
    model = LoRAModel(llama(tied), LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=names)).eval()
    copies = [model.lora_layers[key] for key in model.lora_layers if "embed" in key or "head" in key]
    assert len({id(each.weight) for each in copies}) == (1 if tied else len(names))  # tied as in the base
    for parameter in model.lora_layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = logits(model, ids())
    model.save_adapter(tmp_path)
    back = LoRAModel.from_pretrained(llama(tied), tmp_path).eval()
    theirs = peft.PeftModel.from_pretrained(llama(tied), str(tmp_path)).eval()
    torch.testing.assert_close(logits(back, ids()), expected)
    torch.testing.assert_close(logits(theirs, ids()), expected, **TOLERANCE)
    if tied and len(names) == 1:
        with pytest.raises(MergeError, match="another layer shares"):
            model.merge()
        return
    with model.merged():
        torch.testing.assert_close(logits(model, ids()), expected)
        base: Any = model.base_model
        assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    with pytest.raises(
        BaseMismatchError, match=r"vocabulary of 24 tokens \(rows of model.embed_tokens\), got a base model with 20"
    ):
        LoRAModel.from_pretrained(llama(tied, 20), tmp_path)
    with pytest.raises(FormatError, match=r"wrong shape of model.embed_tokens.weight"):
        LoRAModel.from_pretrained(llama(tied, 20), tmp_path, allow_base_mismatch=True)


def test_a_file_that_holds_the_base_s_embedding_is_read_where_it_is_this_base_s(tmp_path: Path) -> None:
    """PEFT saves the weight of an adapted embedding; here the base is never changed, so it has to be the same."""
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    theirs = peft.get_peft_model(llama(False), settings).eval()
    theirs.save_pretrained(str(tmp_path))
    assert any("base_layer.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = LoRAModel.from_pretrained(llama(False), tmp_path).eval()
    torch.testing.assert_close(logits(ours, ids()), logits(theirs, ids()), **TOLERANCE)
    other = llama(False)
    other.model.embed_tokens.weight.data[21:23] += 1
    with pytest.raises(FormatError, match=r"the file's model\.embed_tokens\.weight differs"):
        LoRAModel.from_pretrained(other, tmp_path)
    with pytest.raises(FormatError, match=r"resize_token_embeddings\(24\)"):
        LoRAModel.from_pretrained(llama(False, 20), tmp_path)


@pytest.mark.parametrize("names", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
@pytest.mark.parametrize(("tied", "is_resized"), [(True, True), (False, True), (False, False)])
def test_a_file_with_trained_and_saved_embeddings_loads(
    names: list[str], tied: bool, is_resized: bool, tmp_path: Path
) -> None:
    """PEFT saves the embeddings of a resized base by itself: of a trained one the copy twice, and the base's weight."""
    llama(tied).save_pretrained(tmp_path / "base")

    def base() -> Any:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        if is_resized:
            model.resize_token_embeddings(28)
        if not tied:
            model.lm_head.bias = nn.Parameter(torch.arange(1.0, 1 + model.lm_head.out_features))
        return model.eval()

    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=list(names), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base(), settings).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "adapter"
    theirs.save_pretrained(str(folder), save_embedding_layers="auto" if is_resized else True)
    keys = set(load_file(folder / "adapter_model.safetensors"))
    assert any(key.endswith(f"{names[0]}.original_module.weight") for key in keys)
    assert any(key.endswith(f"{names[0]}.modules_to_save.weight") for key in keys)
    ours = LoRAModel.from_pretrained(base(), folder).eval()
    assert torch.equal(logits(ours, ids()), logits(theirs, ids()))
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours, ids()), logits(theirs, ids()))
    other = base()
    layer = other.lm_head if "lm_head" in names else other.model.embed_tokens
    layer.weight.data[21:23] += 1
    with pytest.raises(FormatError, match=r"differs from this base's.*original_module.weight into"):
        LoRAModel.from_pretrained(other, folder)


def test_two_versions_of_a_trained_embedding_are_refused(tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(llama(False), settings).save_pretrained(str(tmp_path), save_embedding_layers=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.modules_to_save.weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"unexpected lm_head.modules_to_save.weight"):
        LoRAModel.from_pretrained(llama(False), tmp_path)


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (lambda: llama(False), {"trainable_token_indices": [24]}, r"indices \[24\] are out of range; expected 0..23"),
        (lambda: llama(False), {"trainable_token_indices": {"norm": [1]}}, "expected an embedding, got LlamaRMSNorm"),
        (lambda: llama(False), {"trainable_token_indices": {"embedding": [1]}}, "'embedding' matches no module"),
        (mixed, {"trainable_token_indices": [1]}, "the model's input embedding is unknown"),
        (
            lambda: llama(False),
            {**ROWS, "modules_to_save": ["embed_tokens"]},
            "and modules_to_save; remove it from one of them",
        ),
        (lambda: llama(True), {**ROWS, "modules_to_save": ["lm_head"]}, "tied to model.embed_tokens is in"),
        (lambda: llama(False), {"bias": "all"}, "the model has no bias"),
        (lambda: llama(False), {"bias": "lora_only"}, "none of the adapted layers has a bias"),
        (
            lambda: nn.Sequential(mixed(), nn.LSTM(5, 5)),
            {"bias": "all"},
            "1 is a LSTM that does not add its bias_ih_l0",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(base: Base, settings: Settings, message: str) -> None:
    plain = base()
    names = ["target"] if not isinstance(plain, LlamaForCausalLM) else ["q_proj"]
    with pytest.raises(TargetError, match=message):
        LoRAModel(plain, LoRAConfig(r=2, target_modules=names, **settings))
    assert not any(isinstance(module, Swapped) for module in plain.modules())


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"bias": "lora_only"}])
def test_adapters_with_biases_add_up(settings: Settings) -> None:
    model = adapted(mixed, settings)
    stir(model)
    model.add_adapter("other", LoRAConfig(r=1, target_modules=["target", "head"], bias="lora_only"))
    model.set_adapter("other")
    stir(model, seed=5)
    model.set_adapter(["default", "other"])
    x = torch.randn(3, 4, 8)
    expected = logits(model, x)
    with model.merged():
        torch.testing.assert_close(logits(model, x), expected, **TOLERANCE)


@cases
def test_every_row_of_a_batch_has_the_extras_of_its_adapter(base: Base, batch: Batch, settings: Settings) -> None:
    model, x = adapted(base, settings), batch()
    stir(model)
    model.add_adapter("plain", LoRAConfig(r=1, target_modules=targets(model.base_model)))
    model.add_adapter("other", model.adapters["default"])
    model.set_adapter("other")
    stir(model, seed=5)
    model.eval()
    names = [["default", None, "other", "plain"][i % 4] for i in range(len(x))]
    expected = []
    for i, name in enumerate(names):
        model.set_adapter(name)
        expected.append(logits(model, x)[i])
    model.set_adapter(None)
    with model.adapter_rows(names):
        torch.testing.assert_close(logits(model, x), torch.stack(expected), **TOLERANCE)
        if settings.get("use_dora"):  # the cases of COMPILED
            torch._dynamo.reset()
            compiled = torch.compile(lambda ids: logits(model, ids), backend="eager")
            torch.testing.assert_close(compiled(x), torch.stack(expected), **TOLERANCE)


@cases
def test_extras_are_copied_by_shrink_and_refused_by_combine(base: Base, batch: Batch, settings: Settings) -> None:
    model, x = adapted(base, settings), batch()
    stir(model)
    model.shrink("default", "same", energy=1.0)
    expected = logits(model, x)
    model.set_adapter("same")
    torch.testing.assert_close(logits(model, x), expected, **TOLERANCE)
    model.add_adapter("plain", LoRAConfig(r=1, target_modules=targets(model.base_model)))
    with pytest.raises(AdapterError, match=r"trains (a bias|rows of an embedding), which is not supported"):
        model.combine({"default": 1, "plain": 1}, "sum", "svd")
    with model.adapter_rows(["plain", None][: len(x)] + [None] * (len(x) - 2)):
        torch.testing.assert_close(logits(model, x), logits(base(), x))  # a fresh one; no row has the others


@pytest.mark.parametrize("tied", [False, True])
def test_a_padding_row_gets_the_gradient_that_peft_gives_it(tied: bool) -> None:
    def base() -> nn.Module:
        return chat_model(num_hidden_layers=1, pad_token_id=0, tie_word_embeddings=tied)

    ids = torch.tensor([[0, 5, 7, 0]])
    config = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 0]}
    ours, theirs = LoRAModel(base(), LoRAConfig(**config)), peft.get_peft_model(base(), peft.LoraConfig(**config))
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    (expected,) = (p.grad for name, p in theirs.named_parameters() if name.endswith("tokens_delta.default"))
    found = ours.adapter().extras["model.embed_tokens"].trainable_tokens_delta.grad
    torch.testing.assert_close(found, expected)
    assert (found[1].abs().sum() > 0) == tied


def test_adapters_of_a_batch_train_rows_of_their_own_tokens() -> None:
    base = chat_model(num_hidden_layers=1, tie_word_embeddings=True)
    model = LoRAModel(base, LoRAConfig(r=2, trainable_token_indices=[5, 9]), "a")
    model.add_adapter("b", LoRAConfig(r=2, trainable_token_indices=[7, 5, 11]))
    ids = torch.tensor([[5, 7, 9], [5, 7, 9], [5, 11, 9]])
    with model.adapter_rows(["a", None, "b"]):
        model(input_ids=ids, labels=ids).loss.backward()
    by_adapter = [model.adapter(name).extras["model.embed_tokens"].trainable_tokens_delta for name in "ab"]
    assert all((rows.grad.abs().sum(-1) > 0).all() for rows in by_adapter)  # the head is tied, so all rows


def test_rows_of_a_gemma_embedding_are_scaled_as_the_others() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    net = nn.Sequential(Gemma3TextScaledWordEmbedding(20, 6, padding_idx=0, embed_scale=3.0), nn.Linear(6, 4))
    model = stirred_model(net, LoRAConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [4, 2]}))
    x = torch.tensor([[0, 2, 4, 7]], dtype=torch.int32)
    expected = model(x)
    rows = next(part for key, part in model.lora_layers.items() if key == "0").trainable_tokens_delta
    torch.testing.assert_close(model.base_model[0](x)[0, 1], rows[1] * 3)
    with model.merged():
        torch.testing.assert_close(model(x), expected)
