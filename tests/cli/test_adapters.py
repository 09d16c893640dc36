"""`tailora combine`, `tailora shrink` and `tailora extract`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, check_refused, save_random_adapter
from tiny import chat_model
from transformers import LlamaForCausalLM

from tailora import LoRAModel
from tailora.formats.run_folder import read_system_message, write_system_message

IDS = torch.arange(20).view(2, 10)


def base(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters `one` (rank 4) and `two` (rank 2, other targets)."""
    folder = tmp_path_factory.mktemp("adapters")
    configs: dict[str, dict[str, Any]] = {"one": {}, "two": {"r": 2, "target_modules": ["q_proj", "up_proj"]}}
    for seed, (name, settings) in enumerate(configs.items()):
        save_random_adapter(folder / name, tiny_model, seed=seed, **settings)
    return folder


@pytest.fixture
def adapters(made: Path, tmp_path: Path) -> Path:
    """A copy of it, in which a test can write."""
    return shutil.copytree(made, tmp_path / "adapters")


def logits(tiny_model: Path, folder: Path) -> torch.Tensor:
    found: torch.Tensor = LoRAModel.from_pretrained(base(tiny_model), folder)(IDS).logits
    return found


def test_combining_gives_the_adapter_that_python_gives(tiny_model: Path, adapters: Path) -> None:
    out = adapters / "mix"
    sources = ["--adapter", adapters / "one", "--adapter", f"b={adapters / 'two'}", "--weight", "one=.7,b=-.3"]
    code, said, _ = call("combine", *sources, "--output-dir", out)  # the base is the one that they name
    assert code == 0
    assert "Combined one x 0.7, b x -0.3 by cat\n14 layers of rank 4 to 6; nothing is lost\n" in said
    assert f"tailora chat --model {tiny_model} --adapter {out}" in said
    model = LoRAModel.from_pretrained(base(tiny_model), adapters / "one", "one")
    model.load_adapter(adapters / "two", "b")
    model.combine({"one": 0.7, "b": -0.3}, "mix")
    model.set_adapter("mix")
    torch.testing.assert_close(logits(tiny_model, out), model(IDS).logits, rtol=1e-5, atol=1e-5)

    code, said, _ = call("combine", *sources, "--method", "svd", "--r", 2, "--output-dir", adapters / "small", "--json")
    assert code == 0
    found = json.loads(said)
    assert {each["rank"] for each in found["layers"].values()} == {2}
    assert 0 < found["worst_error"] < 1
    assert found["weights"] == {"one": 0.7, "b": -0.3}


def test_the_system_message_of_the_training_goes_along(adapters: Path) -> None:
    one, two, out = adapters / "one", adapters / "two", adapters / "out"
    shrink = ["shrink", "--adapter", one, "--r", 1, "--output-dir", out, "--overwrite"]
    combine = ["combine", "--adapter", one, "--adapter", two, "--output-dir", out, "--overwrite"]
    for command, others, expected in ((shrink, None, "A"), (combine, "B", None), (combine, "A", "A")):
        write_system_message(one, "A")
        write_system_message(two, others)
        assert call(*command)[0] == 0
        assert read_system_message(out) == expected


def test_shrinking_by_rank_and_by_energy(tiny_model: Path, adapters: Path) -> None:
    code, said, _ = call("shrink", "--adapter", adapters / "one", "--r", 2, "--output-dir", adapters / "a")
    assert code == 0
    assert "14 layers of rank 2; relative error of the updates: " in said
    again = ["shrink", "--adapter", adapters / "one", "--r", 1, "--output-dir", adapters / "a", "--overwrite"]
    code, said, _ = call(*again)
    assert code == 0
    assert "14 layers of rank 1;" in said
    code, _, told = call(*again[:-2], adapters / "one", "--overwrite")
    assert code == 2
    assert "contains the input of this command" in told
    code, _, _ = call("shrink", "--adapter", adapters / "one", "--energy", 1, "--output-dir", adapters / "b")
    assert code == 0
    torch.testing.assert_close(
        logits(tiny_model, adapters / "b"), logits(tiny_model, adapters / "one"), rtol=1e-5, atol=1e-5
    )


def test_extracting_says_what_the_adapter_cannot_hold(tiny_model: Path, adapters: Path) -> None:
    tuned = LoRAModel.from_pretrained(base(tiny_model), adapters / "one").merge_and_unload()
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1.5)
    tuned.save_pretrained(adapters / "tuned")
    (adapters / "tuned" / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    (adapters / "tuned" / "tokenizer_config.json").write_bytes((tiny_model / "tokenizer_config.json").read_bytes())
    both = ["--model", tiny_model, "--tuned", adapters / "tuned"]
    code, said, _ = call("extract", *both, "--r", 4, "--output-dir", adapters / "found")
    assert code == 0
    assert "14 layers of rank 4; " in said
    assert "1 changed tensors are NOT in the adapter; to include them" in said
    assert "model.norm.weight: changed by 50.00%" in said
    assert "The rank is too low" not in said
    low = call("extract", *both, "--r", 1, "--output-dir", adapters / "low")[1]
    assert "The rank is too low to capture most of the difference between the models; raise --r" in low
    torch.testing.assert_close(
        logits(tiny_model, adapters / "found"), logits(tiny_model, adapters / "one"), rtol=1e-4, atol=1e-4
    )
    whole = ["--modules-to-save", "norm", "--energy", 0.9999, "--output-dir", adapters / "all", "--json"]
    code, said, _ = call("extract", *both, *whole)
    assert code == 0
    assert json.loads(said)["left_over"] == {}


BAD: dict[str, tuple[list[str], str]] = {
    "no way": (["shrink", "--adapter", "ONE"], "expected either r or energy, got none"),
    "two ways": (["shrink", "--adapter", "ONE", "--r", "2", "--energy", ".9"], "expected either r or energy, got both"),
    "not an adapter": (["shrink", "--adapter", "BASE", "--r", "2"], "adapter_config.json"),
    "unknown weight": (["combine", "--adapter", "ONE", "--weight", "on=1"], "available names: one; did you mean one"),
    "weight": (
        ["combine", "--adapter", "ONE", "--weight", "one=much"],
        "expected a number such as one=0.5, got 'much'",
    ),
    "nan": (["combine", "--adapter", "ONE", "--weight", "one=nan"], "expected finite numbers"),
    "result's name": (["combine", "--adapter", "default=ONE"], "'default' is reserved; choose a name with NAME="),
    "taken folder": (["combine", "--adapter", "ONE", "--output-dir", "ONE"], "already exists"),
    "same": (["extract", "--model", "BASE", "--tuned", "BASE", "--r", "2"], "no selected layer differs"),
    "shapes": (
        ["extract", "--model", "BASE", "--tuned", "OTHER", "--r", "2"],
        "model.layers.0.mlp.up_proj.weight has shape",
    ),
}


@pytest.mark.parametrize(("tokens", "hint"), BAD.values(), ids=BAD)
def test_mistakes_exit_with_2_and_write_nothing(tokens: list[str], hint: str, tiny_model: Path, adapters: Path) -> None:
    if "OTHER" in tokens:
        chat_model(intermediate_size=48).save_pretrained(adapters / "other")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (adapters / "other" / name).write_bytes((tiny_model / name).read_bytes())
    places: dict[str, Any] = {"ONE": adapters / "one", "BASE": tiny_model, "OTHER": adapters / "other"}
    for name, place in places.items():
        tokens = [token.replace(name, str(place)) for token in tokens]
    out = [] if "--output-dir" in tokens else ["--output-dir", adapters / "out"]
    check_refused(hint, *tokens, *out)
    assert not (adapters / "out").exists()
