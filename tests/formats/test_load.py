"""Loading an adapter: every tensor fits, or all that is wrong is named; nothing in a file is trusted."""

import json
import os
import pickle
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from permissions import modes_obeyed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import chat_model
from tiny_adapters import adapted, logits
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tailora.errors import BaseMismatchError, FormatError
from tailora.formats.load import restore
from tailora.formats.offline import read_offline
from tailora.formats.peft import read_peft_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return adapted({"lora_alpha": 32, "target_modules": ["q_proj", "down_proj"]}).save_adapter(tmp_path / "adapter")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors, as another tool would have written them: without our metadata."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def change_metadata(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change tailora's own fields; the tensors stay."""
    file = folder / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    fields = json.loads(metadata["tailora"])
    change(fields)
    save_file(load_file(file), file, {**metadata, "tailora": json.dumps(fields)})


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def test_missing_unexpected_misshapen_and_non_finite_tensors_are_reported_at_once(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q0}.lora_A.weight"]
        tensors["base_model.model.nonsense"] = torch.zeros(3)
        tensors[f"{Q0.replace('0', '1')}.lora_B.weight"] = torch.zeros(32, 5)
        tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"][0, 0] = torch.nan

    edit(folder, change)
    with pytest.raises(FormatError) as caught:
        LoRAModel.from_pretrained(chat_model(), folder)
    for part in (
        "4 problems",
        "missing model.layers.0.self_attn.q_proj.lora_A.weight",
        "unexpected nonsense (3,)",
        "wrong shape of model.layers.1.self_attn.q_proj.lora_B.weight: expected (32, 4), got (32, 5)",
        "not finite: model.layers.0.mlp.down_proj.lora_A.weight (4, 64)",
    ):
        assert part in str(caught.value)


LARGE = r"not finite in torch.float32: lora_B of model\.layers"
NOT_FINITE: dict[str, tuple[dict[str, Any], str, float, torch.dtype, str]] = {
    "a whole head": ({"modules_to_save": ["lm_head"]}, "lm_head", torch.inf, torch.float32, "not finite: lm_h"),
    "token rows": ({"trainable_token_indices": [1]}, "delta", torch.nan, torch.float32, r"not finite: .*tokens_delta"),
    "magnitudes": ({"use_dora": True}, "magnitude", torch.nan, torch.float32, r"not finite: .*magnitude_vector"),
    "too large for float32": ({}, "lora_B", 1e200, torch.float64, LARGE),
    "8 bits": ({}, "lora_B", torch.nan, torch.float8_e4m3fn, r"not finite: .*lora_B"),
    "integers": ({}, "lora_B", 3, torch.int32, r"expected floats in .*lora_A.weight \(4, 64\), got torch.int32"),
}


@pytest.mark.parametrize(("settings", "key", "value", "dtype", "message"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_no_tensor_that_is_not_finite_is_loaded(
    tmp_path: Path, settings: dict[str, Any], key: str, value: float, dtype: torch.dtype, message: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}
        next(tensor for name, tensor in tensors.items() if key in name).view(-1)[0] = value

    edit(adapted({"lora_alpha": 32, **settings}).save_adapter(tmp_path), change)
    with pytest.raises(FormatError, match=message):
        LoRAModel.from_pretrained(chat_model(), tmp_path)


def test_finite_numbers_whose_sum_is_not_are_loaded(folder: Path) -> None:
    name = f"{Q0}.lora_A.weight"
    edit(folder, lambda tensors: tensors[name].fill_(3e38))
    model = LoRAModel.from_pretrained(chat_model(), folder)
    assert (model.lora_layers["model/layers/0/self_attn/q_proj"].lora_A == torch.tensor(3e38)).all()


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_neither_random_numbers_nor_uninitialised_memory_remain_in_a_loaded_adapter(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = adapted(settings), chat_model()
    folder, empty, state = model.save_adapter(tmp_path), torch.empty, torch.get_rng_state()
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(7))
    loaded = LoRAModel.from_pretrained(base, folder)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_factors_are_taken_over_from_the_file_and_its_tensors_stay_as_they_were_read(tmp_path: Path) -> None:
    stored = read_peft_folder(adapted({"learn_scaling": True}).save_adapter(tmp_path))
    before = {key: tensor.clone() for key, tensor in stored.tensors.items()}
    layers = restore(stored, chat_model().cpu()).low_rank  # where the file's tensors are
    for path, layer in layers.items():
        assert layer.lora_A.data_ptr() == stored.tensors[f"{path}.lora_A.weight"].data_ptr()
    assert before.keys() == stored.tensors.keys()
    assert all(torch.equal(tensor, stored.tensors[key]) for key, tensor in before.items())


@pytest.mark.parametrize(
    "settings", [{}, {"init_lora_weights": "pissa"}, {"target_modules": ["c_attn.q", "c_attn.v", "c_fc"]}], ids=str
)
def test_every_factor_has_memory_of_its_own(tmp_path: Path, settings: dict[str, Any]) -> None:
    def base() -> nn.Module:
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))

    torch.manual_seed(0)
    state = base().state_dict()
    (model := base()).load_state_dict(state)
    folder = adapted(settings, model).save_adapter(tmp_path)
    (model := base()).load_state_dict(state)
    layers = LoRAModel.from_pretrained(model, folder).lora_layers.values()
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    assert all(factor.is_contiguous() for factor in factors)
    assert all(factor.untyped_storage().nbytes() == factor.nbytes for factor in factors)
    assert len({factor.untyped_storage().data_ptr() for factor in factors}) == len(factors)


def test_a_learned_scale_that_makes_a_factor_infinite_is_refused(tmp_path: Path) -> None:
    folder = adapted({"learn_scaling": True}).save_adapter(tmp_path)
    change_metadata(folder, lambda metadata: metadata["scaling"].update(dict.fromkeys(metadata["scaling"], 1e-320)))
    with pytest.raises(FormatError, match=r"not finite in torch\.float32: lora_B"):
        LoRAModel.from_pretrained(chat_model(), folder)


def test_a_refused_adapter_leaves_the_model_as_it_was(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(f"{Q0}.lora_A.weight"))
    base = chat_model()
    with pytest.raises(FormatError):
        LoRAModel.from_pretrained(base, folder)
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = LoRAModel(base, LoRAConfig(r=2))
    with pytest.raises(FormatError):
        model.load_adapter(folder, "broken")
    assert list(model.adapters) == ["default"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True, not False"),
        ({"bias": "lora_only"}, "bias = 'lora_only', not 'none'"),
        ({"use_qalora": True}, "use_qalora = True is not supported"),
        ({"peft_type": "IA3"}, "expected peft_type = 'LORA', got 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights"),
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": 8}, "lora_alpha = 8.0, not 32.0"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, r"missing the factors of model\.layers\.0\..*v_proj"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern = .'q_proj': 3., not"),
    ],
)
def test_settings_that_would_compute_something_else_are_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(FormatError, match=message):
        LoRAModel.from_pretrained(chat_model(), folder)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)+$", ""),
        (".*.*.*.*.*.*.*.*.*.*[^a-z]", ""),
        ("(a|a)*$", r"regular expression .* takes more than 0\.2 s"),
        ("((((a{100}){100}){100}){100}){100}", "counts in the regular expression .* multiply to more than"),
        ("a{99999999999}", "repetition number is too large"),
        ("(" * 9999, "recursion"),
    ],
    ids=["nested", "long", "two ways", "counts", "count", "parentheses"],
)
@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_hostile_pattern_costs_less_than_a_second(tmp_path: Path, setting: str, pattern: str, message: str) -> None:
    base = nn.ModuleDict({"a" * 80 + "b": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model = LoRAModel(base, LoRAConfig(r=2))
    path = model.save_adapter(tmp_path) / "adapter_config.json"
    edit(tmp_path, lambda tensors: tensors)
    base = model.unload()
    value = {pattern: 2} if setting.endswith("pattern") else pattern
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    started = time.process_time()
    with pytest.raises(FormatError, match=message) if message else nullcontext():
        LoRAModel.from_pretrained(base, tmp_path)
    assert time.process_time() - started < 1


def write_config(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def write_header(content: bytes, size: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(size.to_bytes(8, "little") + content)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLACES: list[Callable[[Path], Any]] = [
    Path.mkdir,
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("nowhere"),
    os.mkfifo,
]
DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    *(
        (replace(name, make), f"{name} is a folder, a device or a broken link, not a file")
        for name in (CONFIG, WEIGHTS)
        for make in PLACES
    ),
    (write_config("[" * 100_000), "is not JSON"),
    (write_config('{"a":' * 50_000), "is not JSON"),
    (write_config("{"), "is not JSON"),
    (write_config(""), "is not JSON"),
    (write_config("[]"), "expected a JSON object, got a list"),
    (write_config('{"r": ' + "9" * 5000 + "}"), "is not JSON"),
    (write_config('{"peft_type": "LORA", "lora_alpha": NaN}'), "lora_alpha"),
    (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "is not JSON"),
    (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    (lambda f: (f / WEIGHTS).write_bytes(b""), "not a complete safetensors file"),
    (lambda f: os.truncate(f / WEIGHTS, 9), "not a complete safetensors file"),
    (lambda f: os.truncate(f / WEIGHTS, 3000), "not a complete safetensors file"),
    (write_header(b"{}", 2**63 - 1), "not a complete safetensors file"),
    (write_header(b"[" * 200_000, 200_000), "not a complete safetensors file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_folder_is_refused(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    for read in (read_offline, lambda path: LoRAModel.from_pretrained(chat_model(), path)):
        with pytest.raises(FormatError, match=message):
            read(folder)


def test_a_folder_of_several_adapters_names_them(tmp_path: Path) -> None:
    model = LoRAModel(chat_model(), LoRAConfig(r=2, target_modules=["q_proj"]), "a")
    model.add_adapter("b", LoRAConfig(r=2, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    (tmp_path / "logs").mkdir()
    message = r"has no adapter_model.safetensors; its subfolders a, b contain adapters; use .*/a$"
    for read in (read_offline, lambda path: LoRAModel.from_pretrained(chat_model(), path)):
        with pytest.raises(FormatError, match=message):
            read(tmp_path)
    assert len(LoRAModel.from_pretrained(chat_model(), tmp_path, subfolder="a").lora_layers) == 2


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_may_not_be_read_is_refused(folder: Path, name: str) -> None:
    (folder / name).chmod(0)
    with modes_obeyed(), pytest.raises(FormatError, match=rf"{name}.*Permission denied"):
        LoRAModel.from_pretrained(chat_model(), folder)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "ran"),)

    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FormatError, match="is a pickle, which can run code and is not read"):
        LoRAModel.from_pretrained(chat_model(), folder)
    assert not (folder / "ran").exists()


def test_an_adapter_for_other_weights_is_refused_unless_allowed(tmp_path: Path) -> None:
    """Five layers are named, the others counted."""
    adapted({"target_modules": "all-linear"}, chat_model()).save_adapter(tmp_path)
    with pytest.raises(
        BaseMismatchError, match=r"(?s)a different base model.*14 problems.*allow_base_mismatch=T"
    ) as raised:
        LoRAModel.from_pretrained(chat_model(initializer_range=0.03), tmp_path)
    assert str(raised.value).count("\n  - ") == 6
    assert "  - and 9 more" in str(raised.value)
    model = LoRAModel.from_pretrained(chat_model(initializer_range=0.03), tmp_path, allow_base_mismatch=True)
    assert len(model.lora_layers) == 14


def test_an_adapter_of_a_resized_base_is_refused_on_the_original_one(tmp_path: Path) -> None:
    resized = chat_model()
    resized.resize_token_embeddings(310)
    model = adapted({"target_modules": ["q_proj"]}, resized)
    model.save_adapter(tmp_path)
    with pytest.raises(BaseMismatchError, match=r"(?s)310 tokens.* with 300.*resize_token_embeddings\(310\).*allow_"):
        LoRAModel.from_pretrained(chat_model(), tmp_path)
    assert len(LoRAModel.from_pretrained(chat_model(), tmp_path, allow_base_mismatch=True).lora_layers) == 2
    expected = logits(model)
    assert torch.equal(logits(LoRAModel.from_pretrained(model.unload(), tmp_path)), expected)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.embed_tokens.base_layer.weight"])
def test_the_vocabulary_of_a_file_without_metadata_is_that_of_its_embedding(folder: Path, key: str) -> None:
    edit(folder, lambda tensors: tensors.update({f"base_model.model.{key}": torch.zeros(310, 32)}))
    with pytest.raises(BaseMismatchError, match=r"vocabulary of 310 tokens .*a base model with 300"):
        LoRAModel.from_pretrained(chat_model(), folder)


@pytest.mark.parametrize("without", ["norm", "input_norm"])
def test_a_folder_without_tensors_of_a_module_that_it_names_is_refused(tmp_path: Path, without: str) -> None:
    def base() -> nn.Module:  # "norm" is the whole name of one module, and the end of another's
        return nn.ModuleDict({"fc": nn.Linear(6, 6), "input_norm": nn.LayerNorm(6), "norm": nn.LayerNorm(6)})

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("weight", "bias"):
            del tensors[f"base_model.model.{without}.{name}"]

    model = LoRAModel(base(), LoRAConfig(r=2, target_modules=["fc"], modules_to_save=["norm"]))
    edit(model.save_adapter(tmp_path), change)
    with pytest.raises(FormatError, match=f"missing {without}, which is in modules_to_save"):
        LoRAModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_is_recognised_in_another_precision(folder: Path, dtype: torch.dtype) -> None:
    assert len(LoRAModel.from_pretrained(chat_model().to(dtype), folder).lora_layers) == 4


def test_weights_without_their_settings_file_describe_themselves(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    assert LoRAModel.from_pretrained(chat_model(), folder).adapters["default"].r == 4
    edit(folder, lambda tensors: tensors)  # as another tool writes them
    with pytest.raises(FormatError, match=r"adapter_config\.json does not exist"):
        LoRAModel.from_pretrained(chat_model(), folder)


def test_a_frozen_start_without_its_settings_file_gives_the_same_logits(tmp_path: Path) -> None:
    model = adapted({"init_lora_weights": "pissa"})
    folder = model.save_adapter(tmp_path)
    (folder / "adapter_config.json").unlink()
    assert torch.equal(logits(LoRAModel.from_pretrained(chat_model(), folder)), logits(model))


def test_a_crash_between_replacing_two_files_is_noticed(folder: Path) -> None:
    before = (folder / "adapter_config.json").read_bytes()
    model = LoRAModel(chat_model(), LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    model.save_adapter(folder)
    (folder / "adapter_config.json").write_bytes(before)  # only the weights were exchanged
    with pytest.raises(FormatError, match=r"delete adapter_config\.json to use the weights' settings"):
        LoRAModel.from_pretrained(chat_model(), folder)


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ("{", "metadata is damaged"),
        ('{"base": {"0": {}}}', r"metadata is damaged \(base\.0\.shape"),
        ('{"scaling": {"nowhere": 1.0}}', "learned scales of unknown layers: nowhere"),
        ('{"scaling": {"model.layers.0.self_attn.q_proj": "much"}}', r"metadata is damaged \(scaling"),
        ('{"scaling": {"model.layers.0.self_attn.q_proj": NaN}}', "metadata is damaged"),
        ('{"config": [1]}', r"metadata is damaged \(config"),
        ('{"config": {"nonsense": 1}}', "unknown setting 'nonsense'"),
        ("[" * 100_000, "metadata is damaged"),
    ],
)
def test_hostile_metadata_is_refused(folder: Path, notes: str, message: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "tailora": notes})
    with pytest.raises(FormatError, match=message):
        LoRAModel.from_pretrained(chat_model(), folder)
