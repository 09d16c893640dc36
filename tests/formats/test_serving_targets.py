"""The commands that serve an export match its files; an adapter that a server cannot load is merged."""

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file
from tiny import chat_model, chat_tokenizer
from tiny_adapters import adapted

from tailora.errors import ConfigError
from tailora.formats.serving_targets import TARGETS, ServingExport, ServingSettings

ENDS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 5}}
SETTINGS = ServingSettings(base="owner/base", stop_tokens={2: "<|im_end|>"})
OTHER = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PROGRAMS = ("vllm", "llama-server", "ollama", "mlx_lm.server", "python")


def base(**settings: Any) -> Any:
    return chat_model(**{"max_position_embeddings": 512, **IDS, **settings})


def export_for(
    folder: Path, target: str, lora: dict[str, Any], settings: ServingSettings = SETTINGS, **base_settings: Any
) -> ServingExport:
    model = adapted(lora, base(**base_settings))
    return model.export_for(folder, target, settings=settings, tokenizer=chat_tokenizer(["hello"], **ENDS))


def written_commands(folder: Path, tmp_path: Path, **environment: str) -> list[list[str]]:
    """Returns the commands that serve.sh runs; it is in their folder."""
    done, calls = run_script(folder, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert {line[0] for line in calls} == {str(folder)}
    return [line[1:] for line in calls]


def run_script(
    folder: Path, tmp_path: Path, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Runs serve.sh, from tmp_path, with programs that only say in which folder and how they were called.

    Returns what came of it, and the calls.
    """
    programs, calls = tmp_path / "programs", tmp_path / "calls.jsonl"
    shutil.rmtree(programs, ignore_errors=True)
    programs.mkdir()
    calls.write_text("")
    for name in ("dirname", "mv"):  # what else the scripts need
        (programs / name).symlink_to(str(shutil.which(name)))
    for name in PROGRAMS:
        record = f'#!/bin/sh\n{{ printf "%s\\0" "$PWD" {name} "$@"; echo; }} >> {shlex.quote(str(calls))}\n'
        (programs / name).write_text(record + (': > "$4"\n' if name == "python" else ""))  # the converter's --outfile
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(folder / "serve.sh")],
        env={"PATH": str(programs), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, [line.split("\0")[:-1] for line in calls.read_text().splitlines() if line]


def flags(command: list[str]) -> dict[str, str]:
    return {word: value for word, value in zip(command, [*command[1:], ""], strict=True) if word.startswith("-")}


@pytest.mark.parametrize("target", TARGETS)
def test_the_script_runs_the_commands_that_are_printed(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "my adapter"
    serving = export_for(folder, target, PATTERNS).serving
    assert serving.name == "my-adapter"
    commands = written_commands(folder, tmp_path, LLAMA_CPP="/llama.cpp")
    prepare = [] if serving.prepare is None else [serving.prepare[0]]
    printed = shlex.split(shlex.join(map(shlex.join, [*prepare, *serving.commands])))
    expected = [[word.replace(str(folder), ".") for word in shlex.split(command)] for command in printed]
    written = [[word.replace("/llama.cpp/", "").removesuffix(".part") for word in command] for command in commands]
    assert written == expected
    if serving.prepare is not None:
        assert Path(serving.prepare[1]).exists()
        assert not list(folder.glob("*.part"))
        assert written_commands(folder, tmp_path, LLAMA_CPP="/llama.cpp") == commands[1:], "converted once"


def test_the_folder_of_llama_cpp_may_be_a_path_from_where_the_user_is(tmp_path: Path) -> None:
    export_for(tmp_path / "out", "llama-server", {})
    commands = written_commands(tmp_path / "out", tmp_path, LLAMA_CPP="my programs/llama.cpp")
    assert commands[0][:2] == ["python", f"{tmp_path}/my programs/llama.cpp/convert_hf_to_gguf.py"]
    (tmp_path / "out" / "base.gguf").unlink()
    done, calls = run_script(tmp_path / "out", tmp_path)
    assert not calls
    assert "LLAMA_CPP: set it to the folder of llama.cpp with convert_hf_to_gguf.py" in done.stderr


def test_vllm_gets_the_rank_of_the_widest_layer(tmp_path: Path) -> None:
    (command,) = (exported := export_for(tmp_path / "out", "vllm", PATTERNS)).serving.commands
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {len(tensor) for key, tensor in tensors.items() if "lora_A" in key}
    assert ranks == {config["r"]} == {config["lora_alpha"]} == {16}  # above 9, the largest of rank_pattern; scale 1
    assert command[:3] == ["vllm", "serve", "owner/base"]
    found_flags = flags(command)
    assert found_flags["--max-lora-rank"] == "16"
    assert found_flags["--lora-modules"] == f"out={tmp_path / 'out'}"
    assert found_flags["--max-model-len"] == "512"
    assert "--chat-template" not in found_flags
    assert exported.report.logits.difference <= 1e-4 < exported.report.logits.effect
    (command,) = export_for(tmp_path / "low", "vllm", {"r": 1}).serving.commands
    assert flags(command)["--max-lora-rank"] == "8"  # its older versions have no lower one
    assert json.loads((tmp_path / "low" / "adapter_config.json").read_text())["r"] == 1


def test_llama_server_gets_the_file_and_the_context(tmp_path: Path) -> None:
    serving = export_for(tmp_path / "out", "llama-server", PATTERNS).serving
    (command,) = serving.commands
    found_flags, folder = flags(command), tmp_path / "out"
    assert (found_flags["-m"], found_flags["--lora"]) == (f"{folder}/base.gguf", f"{folder}/adapter.gguf")
    assert (found_flags["--ctx-size"], found_flags["--alias"], found_flags["--port"]) == ("512", "out", "8080")
    assert serving.prepare is not None
    assert serving.prepare[0] == [
        *("python", "convert_hf_to_gguf.py", "owner/base", "--outfile", f"{folder}/base.gguf", "--remote")
    ]
    ranks = {len(tensor.data) for tensor in GGUFReader(folder / "adapter.gguf").tensors if "lora_a" in tensor.name}
    assert max(ranks) == serving.rank == 9
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.gguf", "serve.sh"]


def test_a_base_in_a_folder_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = ServingSettings(base="base", stop_tokens={2: "<|im_end|>"})
    for target in ("vllm", "mlx"):
        (command,) = export_for(tmp_path / target, target, {}, settings).serving.commands
        assert str(tmp_path / "base") in command
    serving = export_for(tmp_path / "llama", "llama-server", {}, settings).serving
    assert serving.prepare is not None
    assert serving.prepare[0][2] == str(tmp_path / "base")
    assert "--remote" not in serving.prepare[0]


def test_a_token_with_a_line_break_runs_nothing(tmp_path: Path) -> None:
    settings = ServingSettings(base="owner/base", stop_tokens={2: "</s>\npython evil #"})
    export_for(tmp_path / "out", "vllm", {}, settings)
    assert [command[0] for command in written_commands(tmp_path / "out", tmp_path)] == ["vllm"]


def test_ollama_gets_a_modelfile(tmp_path: Path) -> None:
    settings = ServingSettings(base="owner/base", stop_tokens={2: "<|im_end|>", 0: '<|"end"|>'})
    export_for(tmp_path / "out", "ollama", PATTERNS, settings)
    text = (tmp_path / "out" / "Modelfile").read_text()
    lines = re.sub(r'""".*?"""', "GO", text, flags=re.DOTALL).splitlines()
    assert lines == [
        "FROM ./base.gguf",
        "ADAPTER ./adapter.gguf",
        "TEMPLATE GO",
        "PARAMETER num_ctx 512",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|"end"|>"',  # Ollama takes what is between the outer quotes as it is
    ]


def test_mlx_gets_its_adapter(tmp_path: Path) -> None:
    (mlx,) = export_for(tmp_path / "mlx", "mlx", PATTERNS).serving.commands
    assert mlx == ["mlx_lm.server", "--model", "owner/base", "--adapter-path", str(tmp_path / "mlx")]
    parameters = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (9, 1.0)


def test_another_chat_template_goes_to_every_server(tmp_path: Path) -> None:
    settings = ServingSettings(base="owner/base", stop_tokens={2: "<|im_end|>"}, chat_template=OTHER)
    model = adapted(base=base())
    tokenizer = chat_tokenizer(["hello"], **ENDS)
    tokenizer.chat_template = OTHER
    for target in TARGETS:
        model.export_for(tmp_path / target, target, settings=settings, tokenizer=tokenizer)
    for target, flag in (("vllm", "--chat-template"), ("llama-server", "--chat-template-file")):
        (command,) = written_commands(tmp_path / target, tmp_path, LLAMA_CPP="/l")[-1:]
        assert (tmp_path / target / flags(command)[flag]).read_text() == OTHER
    (command,) = written_commands(tmp_path / "mlx", tmp_path)
    assert flags(command)["--chat-template"] == OTHER
    assert "[user] {{ .Content }}" in (tmp_path / "ollama" / "Modelfile").read_text()


def test_stop_tokens_that_the_base_does_not_name_are_in_the_script(tmp_path: Path) -> None:
    settings = ServingSettings(base="owner/base", stop_tokens={1: "<|im_start|>", 2: "<|im_end|>"})
    for target in ("vllm", "mlx"):
        assert export_for(tmp_path / target, target, {}, settings).serving.more_stop_tokens == {1: "<|im_start|>"}
    scripts = {target: (tmp_path / target / "serve.sh").read_text() for target in ("vllm", "mlx")}
    assert '"stop_token_ids": [1]' in scripts["vllm"]
    assert '"stop": ["<|im_start|>"]' in scripts["mlx"]
    assert all("Stop tokens: <|im_start|> (1), <|im_end|> (2)." in text for text in scripts.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_what_is_no_low_rank_adapter_is_merged(target: str, lora: dict[str, Any], tmp_path: Path) -> None:
    exported = export_for(tmp_path / "out", target, lora)
    assert exported.serving.format == exported.report.format == "merged"
    assert "cannot load this adapter separately: " in exported.report.changes[0]
    assert exported.serving.rank is None
    commands = written_commands(tmp_path / "out", tmp_path, LLAMA_CPP="/llama.cpp")
    assert not any("owner/base" in word or "lora" in word for command in commands for word in command)
    assert (tmp_path / "out" / "config.json").exists()
    if target == "ollama":
        modelfile = (tmp_path / "out" / "Modelfile").read_text()
        assert modelfile.startswith('FROM ./model.gguf\nTEMPLATE """')


@pytest.mark.parametrize(
    ("target", "lora", "settings", "reason"),
    [
        ("vllm", {"target_modules": ["embed_tokens", "q_proj"]}, {}, "model.embed_tokens: not every vLLM model"),
        ("vllm", {"target_modules": ["lm_head", "q_proj"]}, {}, "lm_head: not every vLLM model"),
        ("vllm", {"r": 513, "target_modules": ["q_proj"]}, {"hidden_size": 520, "head_dim": 130}, "rank 513 is above"),
        ("ollama", {"target_modules": ["lm_head"]}, {"tie_word_embeddings": True}, "lm_head: llama.cpp has a single"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tied")
def test_what_one_server_does_not_take_is_merged(
    target: str, lora: dict[str, Any], settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    report = export_for(tmp_path / "out", target, lora, **settings).report
    assert report.format == "merged"
    assert reason in report.changes[0]


def test_a_merge_after_training_on_a_quantised_base_is_a_choice(tmp_path: Path) -> None:
    settings = replace(SETTINGS, trained_on="nf4")
    assert export_for(tmp_path / "adapter", "vllm", {}, settings).serving.format == "portable"
    with pytest.raises(ConfigError, match=r"use_dora.* as nf4; use --quantize nf4 .* --quantize none"):
        export_for(tmp_path / "out", "vllm", {"use_dora": True}, settings)
    assert not (tmp_path / "out").exists()


def test_a_path_that_a_server_reads_as_several_is_refused(tmp_path: Path) -> None:
    for target, name in (("vllm", "a=b"), ("llama-server", "a,b")):
        with pytest.raises(ConfigError, match=f"{name}: .* treats . in paths as separators"):
            export_for(tmp_path / name, target, {})
    with pytest.raises(ConfigError, match="unknown server 'tgi'; available: vllm, llama-server"):
        export_for(tmp_path / "out", "tgi", {})
    assert not list(tmp_path.iterdir())
