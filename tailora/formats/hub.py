"""Models and adapters on the Hugging Face Hub: the folder that a name refers to, and the model card.

public_name     a base model -> its name for others, and repository_of: that name -> its Hub id
local_folder    a name -> a local folder; the adapter's files of a repository are downloaded once
download        a repository -> also its card, verification file and tokenizer, for `tailora pull`
model_card      README.md, from model_card.md.j2

`upload.py` publishes adapters.
`check_model_exists` looks for a base model before it is loaded.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from glob import escape
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

from tailora.errors import ConfigError, FetchError, TailoraError, WriteError, nearest_path
from tailora.formats.gguf_base import SUFFIX, gguf_file, source_of
from tailora.formats.io import demo_folder
from tailora.formats.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIFFUSERS_WEIGHTS,
    GGUF_WEIGHTS,
    MLX_WEIGHTS,
    SYSTEM,
    adapter_folder,
)

# The weights of an adapter: of PEFT, mlx-lm, `export` to GGUF and diffusers. A pickle is not even downloaded.
WEIGHTS_OF_FORMATS = (ADAPTER_WEIGHTS, MLX_WEIGHTS, GGUF_WEIGHTS, DIFFUSERS_WEIGHTS)
FILES_OF_MODELS = ("config.json", "model_index.json")  # next to them, other safetensors files belong to a model
REPOSITORY = re.compile(r"\b[\w.-]+\b/\b[\w.-]{1,96}\b", re.ASCII)  # as huggingface_hub checks it
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")  # in the path of the Hub's cache
DEMO = "demo"  # the demo's model and data, usable instead of a folder or file
MODEL_NAME = "SmolLM2-135M-Instruct"
DEMO_MODEL = f"HuggingFaceTB/{MODEL_NAME}"
OF_DEMO = "`demo` in tailora, with weights from a 4-bit file"  # so they differ a little from the Hub's

MODEL_TIMEOUT = 5.0  # seconds to wait when asking the Hub for a model
HUB_HELP = (
    "Check the name, the revision, the network (HF_HUB_OFFLINE disables it) and the token (HF_TOKEN or `hf auth "
    "login`). Without a network, use `hf download` on a different machine and copy the folder."
)

# ---- Names


def name_of_model(name: str) -> str:
    """Returns "demo" for the folder of the demo's model, the file for a converted one; any other name unchanged."""
    return DEMO if Path(name) == demo_folder() / MODEL_NAME else source_of(Path(name)) or name


def public_name(base: str) -> str:
    """Returns a base model's name for others: "demo", its Hub id (also in the cache) or the last name of its folder."""
    if name_of_model(base) == DEMO:
        return DEMO
    if snapshot := SNAPSHOT.search(base):
        return f"{snapshot['owner']}/{snapshot['name']}"
    if could_be_repository(base) and not Path(base).exists():
        return base
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1]


def repository_of(name: str) -> str | None:
    """Returns the Hub id of a base model's public name; None for a folder."""
    if name == DEMO:
        return DEMO_MODEL
    return name if could_be_repository(name) else None


def could_be_repository(name: str | Path) -> bool:
    """True for `owner/name` in the Hub's characters. A Path is always local."""
    if not isinstance(name, str) or not REPOSITORY.fullmatch(name):
        return False
    return "--" not in name and ".." not in name and not name.endswith(".git")


@contextmanager
def hub_errors(error_type: type[FetchError | WriteError], what: str) -> Iterator[None]:
    """Turns exceptions of the Hub's client into an error with the Hub's own message and the usual remedies."""
    http_error: Any = import_module("huggingface_hub.errors").HTTPError  # httpx's or httpx2's
    try:
        yield
    except TailoraError:  # some of them are OSErrors or ValueErrors
        raise
    # No network, or no entry in the cache, is an OSError; a name or YAML that the client refuses is a ValueError
    except (http_error, OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise error_type(f"{what} {said}.\n{HUB_HELP}") from None
    except (LookupError, TypeError, AttributeError) as error:  # its client does not check the content of a response
        raise error_type(f"{what} the server's response is not from the Hub: {error!r}.\n{HUB_HELP}") from None


# ---- Downloading


def local_folder(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None, subfolder: str | None = None
) -> Path:
    """Returns the path for `source`: a local file or folder, or otherwise a repository `owner/name` of the Hub.

    For the folder of a run, it is the adapter in it. Only the adapter's files of a repository are downloaded, once.
    Raises FetchError if the Hub has no adapter there, or cannot be reached and nothing was downloaded before.
    """
    if Path(source).exists() or not could_be_repository(source):
        return Path(source, subfolder) if subfolder else adapter_folder(Path(source))
    with hub_errors(FetchError, f"adapter {str(source)!r} is not a local folder, and the Hub does not provide it:"):
        snapshot, files = download(str(source), revision=revision, token=token, subfolder=subfolder, others=[SYSTEM])
    return (snapshot / files[0]).parent


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    others: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """Downloads the weights and settings of an adapter, and the `others` if the repository has them.

    Without a network, it uses files that were downloaded before. Returns the snapshot in the Hub's cache, whose name is
    the commit, and the paths of the files in it, the weights first.
    Raises ConfigError for a subfolder outside of the repository, FetchError if there is no adapter, and what
    huggingface_hub raises.
    """
    from huggingface_hub import HfApi, snapshot_download

    parts = subfolder.removesuffix("/").split("/") if subfolder else []
    if any(part in ("", ".", "..") for part in parts):
        raise ConfigError(f"subfolder {subfolder!r} is not a valid path in the repository; expected a path such as a/b")
    inside = "".join(f"{part}/" for part in parts)

    def fetch(paths: Sequence[str]) -> Path:
        patterns = [escape(path) for path in paths]
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))

    wanted = [inside + name for name in (*WEIGHTS_OF_FORMATS, ADAPTER_CONFIG, *others)]
    snapshot = fetch(wanted)
    files = [path for path in wanted if (snapshot / path).is_file()]
    if not {*files} & {*wanted[: len(WEIGHTS_OF_FORMATS)]}:  # a single safetensors file may have any name
        in_repository = HfApi(token=token).list_repo_files(repo_id, revision=revision)
        names = [path.removeprefix(inside) for path in in_repository if path.startswith(inside)]
        weights = [name for name in names if "/" not in name and name.endswith(".safetensors")]
        if len(weights) != 1 or {*names} & {*FILES_OF_MODELS}:
            raise FetchError(
                f"{repo_id} on the Hub has no adapter{f' in {inside}' if inside else ''}: expected one of "
                f"{', '.join(WEIGHTS_OF_FORMATS)}, or a single .safetensors file of any name. The repository "
                f"contains {', '.join(in_repository[:9])}. Use the folder of an adapter (subfolder), or download a "
                "file with `hf download` and pass its path. Pickles such as adapter_model.bin are never read."
            )
        files.insert(0, inside + weights[0])
        fetch(files[:1])
    return snapshot, files


# ---- Base models


def is_at_hand(name: str) -> bool:
    """True for a base model that is on this machine: the demo's, a folder, or one in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if name == DEMO:
        return (demo_folder() / MODEL_NAME).is_dir()
    if Path(name).is_dir() or gguf_file(name) is not None:
        return True
    return could_be_repository(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)


def find_gguf(name: str) -> Path | None:
    """Returns the GGUF file of a base model: a local one, or one of a Hub repository, downloaded once; None for others.

    `owner/name` is a repository without other weights and with a single GGUF file; `owner/name:Q4_K_M` selects the file
    whose name ends with this. Raises ConfigError if not exactly one file matches, and FetchError.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if (local := gguf_file(name)) is not None or Path(name).exists():
        return local
    repository, _, ending = name.partition(":")
    if not could_be_repository(repository):
        return None
    if not ending and isinstance(try_to_load_from_cache(repository, "config.json"), str):
        return None
    names = _files_on_hub(repository)
    files = [file for file in names if file.lower().endswith(SUFFIX) and "mmproj" not in file]  # of an image encoder
    has_others = any(file.endswith((".safetensors", ".bin")) for file in names)
    if not names or (not ending and (has_others or not files)):
        return None
    has_ending = re.compile(rf"(^|[-./]){re.escape(ending + SUFFIX)}$", re.IGNORECASE)
    matching = [file for file in files if file == ending or not ending or has_ending.search(file)]
    if len(matching) != 1:
        choices = ", ".join(f"{repository}:{file}" for file in files) or "none"
        count = f"{len(matching) or 'no'} GGUF file{'s' * (len(matching) != 1)}"
        raise ConfigError(f"model {name!r} matches {count} on the Hub; use one of: {choices}")
    with hub_errors(FetchError, f"cannot download {matching[0]} of {repository} from the Hub:"):
        return Path(hf_hub_download(repository, matching[0]))


def _files_on_hub(repository: str) -> list[str]:
    """Returns the names of a repository's files; without a network, of its GGUF files in the cache, maybe none."""
    from huggingface_hub import HfApi, snapshot_download

    errors: Any = import_module("huggingface_hub.errors")
    try:
        return [file.rfilename for file in HfApi().model_info(repository, timeout=MODEL_TIMEOUT).siblings or ()]
    except (errors.HTTPError, errors.OfflineModeIsEnabled, LookupError, TypeError):
        pass  # if there are none in the cache, `check_model_exists` reports why
    try:
        folder = Path(snapshot_download(repository, allow_patterns=f"*{SUFFIX}", local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return []
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob(f"*{SUFFIX}"))]


def check_model_exists(name: str) -> None:
    """Raises ConfigError for a model that is no folder, GGUF file or repository of the Hub, which is asked once.

    Without a network, transformers would try for most of a minute.
    """
    from huggingface_hub import HfApi

    errors: Any = import_module("huggingface_hub.errors")
    path = Path(name)
    if could_be_repository(repository := name.partition(":")[0]):
        name = repository  # of a GGUF file in it
    if is_at_hand(name):
        return
    if path.is_file():
        raise ConfigError(f"model {name!r} is a file; use a folder, a GGUF file, a Hub id, or 'demo'")
    try:
        HfApi().model_info(name, timeout=MODEL_TIMEOUT)
        return
    except errors.RepositoryNotFoundError:
        cause = "the Hub has no such model (a private one needs HF_TOKEN)"
    except errors.HfHubHTTPError:
        return  # the Hub answers, but is busy: transformers asks again
    except errors.HFValidationError:
        cause = "it is not a Hub id"
    except (LookupError, TypeError):
        cause = "the server's response is not from the Hub"
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        cause = f"the Hub cannot be reached ({' '.join(str(error).split()).rstrip('.')})"
    hint = nearest_path(path, folders_only=True) or "."
    raise ConfigError(
        f"model {name!r} is not a local folder, and {cause}{hint} Use a folder, a Hub id such as owner/name, or 'demo'"
    )


# ---- The model card

PIPELINE_TAGS = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
NOT_SHOWN = ("peft_type", "base_model_name_or_path", "inference_mode")
# At the end of a card that tailora wrote. If the hash still matches, the card was not edited and may be replaced.
SIGNATURE = re.compile(r"<!-- written by tailora: (?P<digest>[0-9a-f]{16}) -->\s*\Z")


def model_card(settings: Mapping[str, Any], about: str, license_name: str | None = None, **parts: Any) -> str:
    """Returns README.md: the Hub's metadata at its top, `about`, and the settings of adapter_config.json.

    The Hub refuses a commit whose base model is not a repository, so other bases are only named in the text: a folder
    by its last name.
    parts: other variables of model_card.md.j2; its `more_settings` are added to the table.
    """
    from huggingface_hub import ModelCardData

    base = str(settings.get("base_model_name_or_path") or "")
    name = public_name(base) if base else ""
    repository = repository_of(name)
    data = ModelCardData(
        base_model=repository,
        base_model_relation=None if repository is None else "adapter",
        library_name="peft",
        license=license_name,
        pipeline_tag=PIPELINE_TAGS.get(str(settings.get("task_type"))),
        tags=["lora", "tailora"],
    )
    remark = f" ({OF_DEMO})" if name == DEMO else ""
    if repository is None and name and (name != base or Path(name).exists()):  # else an old id of the Hub, as gpt2
        remark = ", a local folder"
    rows = {name: str(value)[:200] for name, value in settings.items() if value and name not in NOT_SHOWN}
    rows |= parts.pop("more_settings", {})
    named_base = f"{repository or name}{remark}" if name else ""
    card = card_template().render(card_data=data.to_yaml(), about=about, base=named_base, settings=rows, **parts)
    return signed(card)


def signed(card: str) -> str:
    """Returns the card with a line, invisible to readers, by which tailora recognizes it."""
    text = card.rstrip()
    return f"{text}\n\n<!-- written by tailora: {_digest(text)} -->\n"


@cache
def card_template() -> Any:
    """Compiled once, because that takes longer than to write a small adapter."""
    from jinja2 import Template

    return Template(Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8"))


def is_written_by_tailora(card: bytes) -> bool:
    """False if a card was written, or edited, by someone else."""
    text = card.decode(errors="replace")
    signature = SIGNATURE.search(text)
    return signature is not None and signature["digest"] == _digest(text[: signature.start()])


def _digest(text: str) -> str:
    return sha256(" ".join(text.split()).encode()).hexdigest()[:16]
