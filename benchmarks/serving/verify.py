"""The fault table and the false alarms of `tailora verify`: real servers with deliberate faults.

    python -m benchmarks.serving.verify --llama-cpp FOLDER --llama-server FILE [--trials 200] [--quick]

FOLDER is llama.cpp's source, for its converter; FILE is its server, built from it:

    cmake -B BUILD -DLLAMA_CURL=OFF FOLDER && cmake --build BUILD --target llama-server

The other servers are `tailora serve`, `transformers serve` and llama-cpp-python's (built by
`pip install llama-cpp-python[server] sentencepiece`). Three adapters of the demo's model are trained for a few steps:
on chats, on the same chats for fewer steps (an outdated file), and on film reviews (a different adapter). Each fault is
put into the files or the flags of a server, never into verify. A false-alarm trial uses a new verification file, with
different texts from the base model, and a correct server. Writes benchmarks/results/verify.json.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import measure
from benchmarks.serving.server_process import started
from benchmarks.studies import snippets
from tailora import LoRAModel
from tailora.cli.models import load_model
from tailora.data.demo import model_folder
from tailora.train.config import TrainConfig
from tailora.train.trainer import run
from tailora.verify.passport import Passport
from tailora.verify.probes import make_passport
from tailora.verify.server_client import ServerClient
from tailora.verify.server_verdict import Verification, verify

STEPS, STALE_STEPS = 40, 12
QUANTIZED = {"bf16": None, "Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # name -> llama.cpp's number of the file type
MORE_QUANTIZED = {"Q6_K": 18, "Q5_K_M": 17, "Q4_1": 3, "Q4_K_S": 14, "IQ4_NL": 25}  # for false alarms
EXPECTED = {
    "none": ["adapter"],
    "the bare base": ["base"],
    "scale times 2": ["scaled"],
    "scale times sqrt(r)": ["scaled"],
    "half of the layers": ["other"],
    "another adapter": ["other", "scaled"],
    "a stale adapter": ["other", "scaled"],
    "another template": ["other"],
    "a second BOS": ["other"],
}
IN_FILES = [*list(EXPECTED)[:1], *list(EXPECTED)[2:7]]  # faults that are in the file of the adapter


# ---- Adapters, with faults in their files


def train(folder: Path, steps: int, data: str) -> None:
    """Trains an adapter of the demo's model, as `tailora demo` does."""
    run(TrainConfig(model="demo", data=data, output_dir=str(folder), max_steps=steps, learning_rate=1e-3, seed=0))


def with_fault(model: LoRAModel, fault: str) -> None:
    """Changes the only adapter of a model."""
    adapter = model.adapter("default")
    r = max(layer.r for layer in adapter.low_rank.values())
    if fault.startswith("scale"):
        model.set_scale("default", 2.0 if fault.endswith("2") else r**0.5)
    if fault == "half of the layers":
        for path, layer in adapter.low_rank.items():
            if int(path.split(".")[2]) >= 15:
                torch.nn.init.zeros_(layer.lora_B)


class Files:
    """The files that servers read: per fault an adapter as PEFT and as GGUF, merged models, and quantised bases."""

    def __init__(self, folder: Path, llama_cpp: Path) -> None:
        self.folder, self.base = folder, Path(model_folder())
        for name, steps, data in (
            ("chats", STEPS, "demo"),
            ("stale", STALE_STEPS, "demo"),
            ("reviews", STEPS, str(snippets.snippets_folder() / "train.jsonl")),
        ):
            if not (folder / name).exists():
                measure.log(f"training {name}")
                train(folder / name, steps, data)
        trained = {"another adapter": "reviews", "a stale adapter": "stale"}
        for fault in IN_FILES:
            adapter = folder / trained.get(fault, "chats") / "adapter"
            loaded = load_model("demo", {"default": adapter})
            with_fault(loaded.model, fault)
            for form in ("portable", "gguf", "merged") if fault in ("none", "scale times 2") else ("portable", "gguf"):
                shutil.rmtree(self.of(fault, form), ignore_errors=True)
                loaded.model.export(self.of(fault, form), form, tokenizer=loaded.tokenizer)
            folder_of_both = self.of(fault, "portable")  # transformers serve reads base and adapter in one folder
            loaded.tokenizer.save_pretrained(folder_of_both)
            for name in ("config.json", "generation_config.json", "model.safetensors"):
                (folder_of_both / name).symlink_to(self.base / name)
        converter = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(self.base), "--outtype", "bf16"]
        environment = {**os.environ, "PYTHONPATH": str(llama_cpp / "gguf-py")}
        subprocess.run(
            [*converter, "--outfile", str(self.gguf("bf16"))], check=True, capture_output=True, env=environment
        )
        for name, file_type in (QUANTIZED | MORE_QUANTIZED).items():
            if file_type is not None:
                quantize(self.gguf("bf16"), self.gguf(name), file_type)

    def of(self, fault: str, form: str) -> Path:
        return self.folder / form / fault.replace(" ", "-").replace("(", "").replace(")", "")

    def gguf(self, name: str) -> Path:
        return self.folder / f"base-{name}.gguf"


def quantize(source: Path, target: Path, file_type: int) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp did not quantize {source}")


# ---- Servers


def llama_server(program: Path, files: Files, quantization: str, fault: str) -> list[str]:
    adapter = files.of(fault if fault in IN_FILES else "none", "gguf") / "adapter.gguf"
    command = [str(program), "--model", str(files.gguf(quantization)), "--threads", "1", "--ctx-size", "1024"]
    command += ["--no-ui"]
    if fault != "the bare base":
        command += ["--lora", str(adapter)]
    flags = {
        "another template": ["--no-jinja", "--chat-template", "llama2"],
        "a second BOS": ["--override-kv", "tokenizer.ggml.add_bos_token=bool:true"],
    }
    return command + flags.get(fault, [])


def llama_cpp_python(files: Files, quantization: str, fault: str) -> list[str]:
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(files.gguf(quantization)), "--n_threads", "1"]
    command += ["--n_ctx", "1024", "--logits_all", "true"]
    if fault != "the bare base":
        adapter = fault if fault in IN_FILES else "none"
        command += ["--lora_path", str(files.of(adapter, "gguf") / "adapter.gguf")]
    if fault == "another template":
        command += ["--chat_format", "alpaca"]
    if fault == "a second BOS":
        command += ["--kv_overrides", "tokenizer.ggml.add_bos_token=bool:true"]
    return command


def own_server(files: Files) -> list[str]:
    adapters = [part for fault in IN_FILES for part in ("--adapter", f"{fault}={files.of(fault, 'portable')}")]
    return [sys.executable, "-m", "tailora", "serve", "--model", "demo", "--name", "base", *adapters]


# ---- Trials


def ask(url: str, model: str | None, passport: Passport, base: str | None = None) -> Verification:
    with ServerClient(url) as server:
        model = model or next(iter(server.models()))
        of_base = None if base is None else server.ask(passport.probes, base)
        return verify(passport, server.ask(passport.probes, model), of_base)


def row(server: str, quantization: str, fault: str, result: Verification) -> dict[str, Any]:
    is_named = result.verdict in EXPECTED[fault]
    measure.log(f"{server}, {quantization}, {fault}: {result.verdict} {result.scale or ''} {'' if is_named else '!'}")
    evidence = result.evidence if not is_named else []
    return {
        "server": server,
        "base": quantization,
        "fault": fault,
        "verdict": result.verdict,
        "scale": result.scale,
        "is_named": is_named,
        "is_right": (result.verdict == "adapter") == (fault == "none"),
        "evidence": evidence,
    }


def fault_table(files: Files, program: Path, passport: Passport) -> list[dict[str, Any]]:
    """program: llama-server."""
    rows = []
    for quantization in QUANTIZED:
        for fault in EXPECTED:
            with started(llama_server(program, files, quantization, fault)) as url:
                rows.append(row("llama-server", quantization, fault, ask(url, None, passport)))
    for quantization in QUANTIZED:
        for fault in EXPECTED:
            with started(llama_cpp_python(files, quantization, fault)) as url:
                rows.append(row("llama-cpp-python", quantization, fault, ask(url, None, passport)))
    with started(own_server(files)) as url:
        rows += [row("tailora serve", "bf16", fault, ask(url, fault, passport, "base")) for fault in IN_FILES]
        rows.append(row("tailora serve", "bf16", "the bare base", ask(url, "base", passport)))
    with started(["transformers", "serve", "--device", "cpu", "--dtype", "bfloat16"]) as url:
        for fault, form in (
            ("none", "merged"),
            ("scale times 2", "merged"),
            *((name, "portable") for name in IN_FILES),
        ):
            where = f"transformers serve, {'merged' if form == 'merged' else 'adapter'}"
            rows.append(row(where, "bf16", fault, ask(url, str(files.of(fault, form)), passport)))
        rows.append(row("transformers serve", "bf16", "the bare base", ask(url, str(files.base), passport)))
    return rows


def false_alarms(files: Files, program: Path, passports: dict[str, list[Passport]]) -> Iterator[list[dict[str, Any]]]:
    """Asks servers that do all right, and yields what it has so far after each of them.

    program: llama-server.    passports: of each fault that is itself a correct adapter.
    """
    rows = []
    for fault, of_adapter in passports.items():
        for quantization in QUANTIZED | MORE_QUANTIZED:
            with started(llama_server(program, files, quantization, fault)) as url:
                rows += [row("llama-server", quantization, "none", ask(url, None, passport)) for passport in of_adapter]
            yield rows
    with started(own_server(files)) as url:
        for fault, of_adapter in passports.items():
            rows += [row("tailora serve", "bf16", "none", ask(url, fault, passport)) for passport in of_adapter]
            yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--llama-server", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="keep the adapters in this folder and reuse existing ones")
    parser.add_argument("--faults", action="store_true", help="measure only the faults again; keep the trials")
    parser.add_argument("--quick", action="store_true", help="20 trials, written next to other quick results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        files = Files(arguments.folder or Path(temporary), arguments.llama_cpp)
        right = {"none": "chats", "another adapter": "reviews"}
        path = (measure.QUICK if arguments.quick else measure.RESULTS) / "verify.json"
        trials = 20 if arguments.quick else arguments.trials
        count = trials // (len(right) * (len(QUANTIZED | MORE_QUANTIZED) + 1))
        passports: dict[str, list[Passport]] = {}
        for fault, name in right.items():
            loaded = load_model("demo", {"default": files.folder / name / "adapter"})
            passports[fault] = []
            for seed in range(1 if arguments.faults else count):
                began = time.perf_counter()
                passports[fault].append(make_passport(loaded.model, loaded.tokenizer, seed=seed))
                measure.log(f"verification file {seed} of {name}: {time.perf_counter() - began:.1f} s")
        program = arguments.llama_server
        faults = fault_table(files, program, passports["none"][0])
        earlier = [json.loads(path.read_text())["trials"]] if arguments.faults else None
        alarms = earlier or false_alarms(files, program, passports)
        for trials in alarms:
            measure.log(str(measure.write(path, {"steps": STEPS, "faults": faults, "trials": trials})))


if __name__ == "__main__":
    main()
