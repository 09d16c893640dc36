"""`tailora export`."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import get_args

import pytest
from command_line import check_refused, found, output
from safetensors.torch import load_file, save_file
from tiny import CHATML, stirred_model
from tiny import tiny_model as tiny_model_of
from tiny_vision import outspoken_llava, save
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.cli.export import Format, Server
from tailora.cli.main import main
from tailora.errors import DataError, FormatError
from tailora.formats.export import FORMATS
from tailora.formats.run_folder import read_system_message, write_system_message
from tailora.formats.serving_targets import TARGETS
from tailora.verify.passport import read_passport
from tailora.verify.probes import make_passport

NO_PASSPORT = "--no-verification-file"  # which takes half of the time


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    """A run's folder, whose adapter names its base."""
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    model = stirred_model(base, LoRAConfig(r=4, use_rslora=True))
    model.save_adapter(tmp_path / "run" / "adapter")
    return tmp_path / "run"


@pytest.mark.parametrize("to", get_args(Format))
def test_every_format_with_its_figures_and_the_next_command(
    to: str, run: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = found("export", run, "--to", to, "--output", tmp_path / "a", NO_PASSPORT)
    assert result["format"] == to
    assert result["model"] == str(tiny_model)
    assert result["logits"]["difference"] <= result["logits"]["tolerance"] < result["logits"]["effect"]
    assert result["files"] == {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    out = tmp_path / ("b" if to == "merged" else "a")  # a model is not replaced
    more = [] if to == "peft" else [NO_PASSPORT]
    assert main(["export", str(run), "--to", to, "--output", str(out), "--overwrite", *more]) == 0
    shown = capsys.readouterr()
    assert re.search(r"exported files, the logits (are equal to|differ by \S+ of their size from) the live", shown.out)
    use = {"portable": "`--to vllm` also", "gguf": "`--to llama-server` also"}.get(to, "tailora chat ")
    assert re.search(rf"^{use}.*", shown.out, re.MULTILINE)
    assert (f"tailora verify URL --adapter {out}" in shown.out) == (to == "peft")
    assert "it/s" not in shown.err


@pytest.mark.parametrize("to", get_args(Server))
def test_every_server_with_its_command(to: str, run: Path, tmp_path: Path) -> None:
    tokens = ["export", str(run), "--to", to, "--output", str(tmp_path / "a")]
    serving = found(*tokens, NO_PASSPORT)["serving"]
    assert (serving["target"], serving["name"], serving["stop_tokens"]) == (to, "a", {"2": "<|im_end|>"})
    assert (serving["more_stop_tokens"], serving["chat_template"], serving["context_length"]) == ({}, None, 512)
    shown = output(*tokens, "--overwrite", *([] if to == "vllm" else [NO_PASSPORT]))
    start = shown.index(f"To serve it, run {tmp_path / 'a' / 'serve.sh'} or this command:")
    assert (0 < shown.find('add "rope_theta"') < start) == (to == "mlx")  # what has to be done first
    assert all(shlex.join(command) in shown for command in serving["commands"])
    for words in ("convert_hf_to_gguf.py", "pip install sentencepiece"):
        assert (words in shown) == (to in ("llama-server", "ollama"))
    assert ("tailora verify http://127.0.0.1:" in shown) == (to == "vllm")


def test_the_servers_of_the_flag_are_those_of_the_table() -> None:
    assert list(get_args(Server)) == list(TARGETS)
    assert FORMATS.keys() == {*get_args(Format), "mlx", "diffusers"}


def test_the_template_of_another_trainer_is_served(run: Path, tmp_path: Path) -> None:
    other = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|endoftext|>{% endfor %}"
    (run / "adapter" / "chat_template.jinja").write_text(other)
    result = found("export", run, "--to", "vllm", "--output", tmp_path / "out", NO_PASSPORT)
    assert result["serving"]["chat_template"] == other
    assert result["serving"]["commands"][0][-4:-2] == ["--chat-template", f"{tmp_path}/out/chat_template.jinja"]
    assert result["serving"]["more_stop_tokens"] == {"0": "<|endoftext|>"}  # which ends a reply in that template
    assert "the chat template is the one used in training" in result["changes"][0]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == other
    (run / "adapter" / "chat_template.jinja").unlink()
    (run / "adapter" / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))  # the base's own
    same = found("export", run, "--to", "vllm", "--output", tmp_path / "same", NO_PASSPORT)
    assert same["serving"]["chat_template"] is None
    (run / "adapter" / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "a"}]}))
    check_refused("several chat templates", "export", run, "--to", "vllm", "--output", tmp_path / "several")
    assert not (tmp_path / "several").exists()


def test_a_merge_after_a_quantised_run_needs_the_flag(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = stirred_model(LlamaForCausalLM.from_pretrained(tiny_model), LoRAConfig(r=4, use_dora=True))
    model.save_adapter(run / "adapter")
    (run / "run.json").write_text(json.dumps({"settings": {"quantize": "nf4"}}))
    tokens = ["export", str(run), "--to", "vllm", "--output", str(tmp_path / "out")]
    check_refused("trained on a base quantized as nf4; use --quantize nf4", *tokens)
    assert not (tmp_path / "out").exists()
    result = found(*tokens, "--quantize", "none", NO_PASSPORT)
    assert (result["format"], result["serving"]["rank"]) == ("merged", None)


@pytest.mark.parametrize(
    ("tokens", "code", "hint"),
    [
        (["RUN", "--to", "ggml"], 2, 'Invalid value "ggml" for --to. Choose from: "peft", "portable", "gguf"'),
        (["RUN", "--to", "vllm", "--output", "A=B"], 2, "vLLM treats = in paths as separators; rename the folder"),
        (["RUN", "--to", "gguf", "--output", "OUT"], 2, "already exists and contains mine.txt, but only"),
        (
            ["RUN", "--to", "gguf", "--output", "RUN/adapter"],
            2,
            "already exists and contains the input of this command",
        ),
        (["NAMELESS", "--to", "gguf"], 2, "does not name its base model in adapter_config.json; set --model"),
        (["RUN", "--to", "gguf", "--model", "absent"], 2, "is not a local folder"),
    ],
)
def test_mistakes(
    tokens: list[str], code: int, hint: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "nameless").mkdir()
    places = {"OUT": str(tmp_path / "full"), "NAMELESS": str(tmp_path / "nameless"), "A=B": str(tmp_path / "a=b")}
    given = [token.replace("RUN", str(run)) if "RUN" in token else places.get(token, token) for token in tokens]
    given += [] if "--output" in given else ["--output", str(tmp_path / "out")]
    assert main(["export", *given]) == code
    shown = capsys.readouterr().err
    assert hint in shown
    assert "device:" not in shown  # the model is not read
    assert "--overwrite" not in shown
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_model_for_images_is_merged_and_has_a_passport_but_no_server(tmp_path: Path) -> None:
    base = save(tmp_path / "base", *outspoken_llava())
    config = LoRAConfig(r=2, target_modules="language-model")
    model = stirred_model(AutoModelForImageTextToText.from_pretrained(base), config)
    model.save_adapter(tmp_path / "adapter")
    tokens = ["export", str(tmp_path / "adapter"), "--model", str(base), "--output", str(tmp_path / "out"), "--to"]
    check_refused("--to vllm does not support vision-language models such as", *tokens, "vllm")
    check_refused("model_type 'llava' is not supported in GGUF", *tokens, "gguf")
    report = found(*tokens, "merged")
    assert report["logits"]["difference"] < 1e-5 < report["logits"]["effect"]
    assert {"passport.json", "processor_config.json", "chat_template.jinja"} <= report["files"].keys()


@pytest.mark.parametrize("to", ["peft", "ollama", "vllm"])
def test_the_system_message_of_training_goes_along_or_is_missed(to: str, run: Path, tmp_path: Path) -> None:
    out, system = tmp_path / "out", 'Answer "briefly".\nAlways.'
    write_system_message(run / "adapter", system)
    shown = " ".join(output("export", run, "--to", to, "--output", out, NO_PASSPORT).split())
    assert read_system_message(out) == system
    assert "he system message used in training is in system_message.txt" in shown
    lacks = "Requests need the system message used in training (system_message.txt): vLLM cannot store it."
    assert (lacks in shown) == (to == "vllm")
    if to == "vllm":
        assert lacks in (out / "serve.sh").read_text()
    if to == "ollama":
        assert f'SYSTEM """{system}"""\n' in (out / "Modelfile").read_text()


def test_overwrite_never_deletes_what_is_no_exported_adapter(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    model, mine, source = tmp_path / "model", tmp_path / "mine", tmp_path / "source"
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "run.json").write_text("{}")
    shutil.copytree(tiny_model, model)
    for folder in (mine, source):
        shutil.copytree(run / "adapter", folder)
    (mine / "notes.txt").touch()
    for adapter, folder, problem in [
        (run, model, "contains config.json, generation_config.json, "),
        (run, mine, "contains notes.txt, but only adapter_model.safetensors, adapter_config.json"),
        (run, copy, "contains adapter, run.json, "),
        (run, copy / "adapter", "is the adapter of a run"),
        (source, source, "contains the input of this command"),
        (source / "adapter_model.safetensors", source, "contains the input of this command"),
    ]:
        before = sorted(folder.rglob("*"))
        check_refused(problem, "export", adapter, "--to", "peft", "--output", folder, "--overwrite")
        assert sorted(folder.rglob("*")) == before


def test_a_lora_file_of_another_tool_needs_the_model_and_becomes_a_peft_folder(
    run: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    file = tmp_path / "style.safetensors"
    save_file({key.removeprefix("base_model.model."): value for key, value in tensors.items()}, file)
    assert main(["export", str(file), "--model", str(tiny_model), "--to", "peft", "--output", str(tmp_path / "p")]) == 0
    capsys.readouterr()
    for adapter in (file, tmp_path / "p"):
        tokens = ["--model", str(tiny_model), "--adapter", str(adapter), "--prompt", "a", "--max-new-tokens", "4"]
        assert found("predict", *tokens)["adapters"] == [adapter.stem]


def test_the_passport_is_of_the_exported_weights_and_can_be_left_out(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "peft", "--output", str(out)]) == 0
    assert read_passport(out).probes
    weights = load_file(out / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, out / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="does not belong to the weights"):
        read_passport(out)
    assert main(["export", str(out), "--to", "gguf", "--output", str(tmp_path / "new")]) == 0
    assert read_passport(tmp_path / "new").weights.keys() == {"adapter.gguf"}
    assert main(["export", str(out), "--to", "peft", "--output", str(tmp_path / "none"), NO_PASSPORT]) == 0
    assert not (tmp_path / "none" / "passport.json").exists()


def test_only_language_models_of_one_decoder_have_a_passport() -> None:
    encoder_decoder = LoRAModel(tiny_model_of("BartForConditionalGeneration"), LoRAConfig(r=1))
    other = LoRAModel(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=1, target_modules=["0"]))
    for model in (encoder_decoder, other):
        with pytest.raises(DataError, match="only supported for decoder-only language models"):
            make_passport(model, None)


def test_an_adapter_that_changes_nothing_is_exported_without_passport(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LoRAModel(LlamaForCausalLM.from_pretrained(tiny_model), LoRAConfig(r=4)).save_adapter(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--to", "peft", "--output", str(tmp_path / "a")]) == 0
    assert "passport.json was not written: the adapter changes no" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a" / "passport.json").exists()
