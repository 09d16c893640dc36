"""Base models in GGUF files, as llama.cpp uses them. transformers converts a file once, to a folder in the cache.

gguf_file       the file that a name stands for
converted_base  its folder: bfloat16 weights, tokenizer, chat template
convert         file -> folder
"""

import io
import struct
from contextlib import redirect_stderr
from hashlib import sha256
from os.path import abspath
from pathlib import Path

from tailora.core.cache import cache_folder
from tailora.errors import ConfigError
from tailora.formats.io import build_once
from tailora.quiet import quiet_transformers

SUFFIX = ".gguf"
SOURCE = "gguf_file.txt"  # in the folder: the path of the file


def gguf_file(name: str) -> Path | None:
    """Returns the GGUF file of a model that is one, or a folder with one and without config.json; None for others.

    Raises ConfigError for a folder with several, such as different quantizations.
    """
    path = Path(name)
    if path.suffix.lower() == SUFFIX and path.is_file():
        return path
    is_folder = path.is_dir() and not (path / "config.json").exists()
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX) if is_folder else []
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"model {name!r} contains several GGUF files ({names}); use the path of one file")
    return files[0] if files else None


def converted_base(file: Path) -> Path:
    """Returns the folder with the converted model. A file that changed is converted again.

    Raises ConfigError if transformers cannot read the file, and FetchError if the folder cannot be written.
    """
    file = Path(abspath(file))  # not resolved: a file in the Hub's cache links to one with a different name

    def build(folder: Path) -> None:
        convert(file, folder)
        (folder / SOURCE).write_text(f"{file}\n")

    return build_once(folder_of(file), build)


def folder_of(file: Path) -> Path:
    """Returns the folder for the file's model, which `converted_base` creates."""
    file = Path(abspath(file))
    stat = file.stat()
    key = sha256(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache_folder() / "gguf" / f"{file.stem}-{key}"


def convert(file: Path, folder: Path) -> None:
    """Writes the file's model to a folder. Raises ConfigError if transformers cannot read all of its weights."""
    import torch  # takes seconds, and the names above are needed before
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # its progress bar for dequantization cannot be disabled
        with quiet_transformers(warnings=False), redirect_stderr(io.StringIO()):
            model, report = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                output_loading_info=True,
                use_kernels=False,
                ignore_mismatched_sizes=True,  # see below
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # what transformers and its reader raise for an unknown architecture or tokenizer, and for a damaged file
    except (ValueError, LookupError, NotImplementedError, OSError, struct.error) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(
            f"transformers cannot read the GGUF file {file} ({cause}); use the folder of the original model"
        ) from error
    unread = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if unread:  # transformers starts them at random
        raise ConfigError(
            f"the GGUF file {file} lacks {len(unread)} weights of {type(model).__name__}, or has them in different "
            f"shapes: {', '.join(sorted(unread)[:3])}; use a complete file (a split one is not supported), or the "
            "folder of the original model"
        )
    # The weights are dense now, but a model that is marked as quantized cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    with quiet_transformers(warnings=False):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def source_of(folder: Path) -> str | None:
    """Returns the path of the GGUF file from which a folder was converted; None for others, and if the file is gone."""
    if folder.parent != cache_folder() / "gguf" or not (folder / SOURCE).exists():
        return None
    source = (folder / SOURCE).read_text().strip()
    return source if Path(source).is_file() else None
