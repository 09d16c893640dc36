"""Models and adapters on the Hugging Face Hub: the folder that a name refers to, uploads, and the model card.

public_name     a base model -> its name for others, and repository_of: that name -> its Hub id
local_folder    a name -> a local folder; the adapter's files of a repository are downloaded once
download        a repository -> also its card, verification file and tokenizer, for `tailora pull`
shared_files    the files of an adapter to publish, checked and without paths of this machine
upload          a folder -> one commit, for `tailora push` and `LoRAModel.push_to_hub`
model_card      README.md, from model_card.md.j2

`check_model_exists` looks for a base model before it is loaded.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from glob import escape
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailora.errors import ConfigError, FetchError, FormatError, TailoraError, WriteError, listing, nearest_path
from tailora.formats.gguf_base import SUFFIX, gguf_file, source_of
from tailora.formats.io import check_is_file, demo_folder, safetensors_header, with_metadata, wrap_os_error
from tailora.formats.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    DIFFUSERS_WEIGHTS,
    GGUF_WEIGHTS,
    METADATA_KEY,
    MLX_WEIGHTS,
    SYSTEM,
    TOKENIZER_FILES,
    adapter_folder,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from jinja2 import Template

# The weights of an adapter: of PEFT, mlx-lm, `export` to GGUF and diffusers. A pickle is not even downloaded.
WEIGHTS_OF_FORMATS = (ADAPTER_WEIGHTS, MLX_WEIGHTS, GGUF_WEIGHTS, DIFFUSERS_WEIGHTS)
FILES_OF_MODELS = ("config.json", "model_index.json")  # next to them, other safetensors files belong to a model
SHARED = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, SYSTEM, *TOKENIZER_FILES)  # uploaded, along with the card and PASSPORT
REPOSITORY = re.compile(r"\b[\w.-]+\b/\b[\w.-]{1,96}\b", re.ASCII)  # as huggingface_hub checks it
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")  # in the path of the Hub's cache
DEMO = "demo"  # the demo's model and data, usable instead of a folder or file
MODEL_NAME = "SmolLM2-135M-Instruct"
DEMO_MODEL = f"HuggingFaceTB/{MODEL_NAME}"
OF_DEMO = "`demo` in tailora, with weights from a 4-bit file"  # so they differ a little from the Hub's

MODEL_TIMEOUT = 5.0  # seconds to wait when asking the Hub for a model
UPLOAD_OPTIONS = {"private", "token", "revision", "create_pr", "commit_message", "commit_description"}
TO_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
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
    revision: a branch, tag or commit. token: for a private repository.
    Raises FetchError if `source` could be a repository and the Hub has no adapter there, or if the Hub cannot be
    reached and the files were not downloaded before.
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


# ---- The files to publish

# Words in a tokenizer's vocabulary are not paths
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
BEGIN, END = r"(?<![\w.~-])(?<![\w:.]/)", r"(?![\w-])[\w./@-]*"  # of a path that is not inside a longer path or a URL
HOME = BEGIN + r"(?:/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)[\w.@-]+[\w./\\@-]*"  # a home directory of any system
TOKEN = r"hf_[A-Za-z0-9]{30,}"  # of the Hub; some tools wrote it into tokenizer files
ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|([/bfnrt]))")  # of JSON, also in JSON within a string of JSON


def shared_files(folder: Path, base_name: str | None = None) -> tuple[dict[str, bytes], str]:
    """Returns name -> content of the files of a PEFT folder to publish, and the folder's own name for its base.

    The card is not among them. The folder does not change.
    base_name: the name for the base model in the files; by default its public name.
    Raises FormatError for a link, and for a folder that is damaged or is not an adapter in PEFT's format.
    """
    from tailora.formats.offline import updates_of  # imports torch
    from tailora.formats.peft import read_peft_folder

    stored = read_peft_folder(folder)
    updates_of(stored)
    if stored.settings is None:
        raise FormatError(f"{folder} has no {ADAPTER_CONFIG}, which PEFT and servers need; save the adapter again")
    files = {name: shared_content(folder / name) for name in SHARED if (folder / name).exists()}
    base = stored.metadata.base_folder or str(stored.settings.get("base_model_name_or_path") or "")
    settings = {**stored.settings, "base_model_name_or_path": base_name or (public_name(base) if base else None)}
    files[ADAPTER_CONFIG] = (json.dumps(settings, indent=2) + "\n").encode()
    if stored.metadata.base_folder is not None:
        metadata = safetensors_header(files[ADAPTER_WEIGHTS])["__metadata__"]
        metadata[METADATA_KEY] = stored.metadata.model_copy(update={"base_folder": None}).to_json()
        files[ADAPTER_WEIGHTS] = with_metadata(files[ADAPTER_WEIGHTS], metadata)
    return files, base


def shared_content(path: Path) -> bytes:
    """Returns the content of a file. Raises FormatError for a link, which could lead to any file on this machine."""
    check_is_file(path)
    if path.is_symlink():
        raise FormatError(f"{path} is a link, and only files in the folder itself are uploaded; replace it with a copy")
    with wrap_os_error(path):
        return path.read_bytes()


def make_public(folder: Path) -> None:
    """Replaces the files of a PEFT folder with those to publish. Raises as `shared_files` does."""
    files, base = shared_files(folder)
    check_nothing_private(folder, files, base)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def check_nothing_private(folder: Path, files: Mapping[str, bytes], base: str) -> None:
    """Raises FormatError with the tokens and local paths in these files; of weights, only the header is searched.

    Local paths are those below a home directory, `folder`, the current folder, and the base model's folder.
    """
    here = [str(path) for path in (Path.home(), Path.cwd(), folder.resolve()) if len(path.parts) > 1]
    here += [base] if Path(base).is_absolute() else []
    paths = "|".join([*(f"{BEGIN}{re.escape(path)}{END}" for path in here), HOME, TOKEN])
    problems = []
    for name, content in files.items():
        if name == ADAPTER_WEIGHTS:
            name, content = f"the metadata of {name}", json.dumps(safetensors_header(content)).encode()
        text = content.decode(errors="replace")
        text += f"\n{ESCAPE.sub(_unescape, text)}"
        if private := re.findall(TOKEN if name in VOCABULARY else paths, text):
            problems.append(f"{name} contains {', '.join(list(dict.fromkeys(private))[:3])}")
    if problems:
        raise FormatError(
            f"{folder} cannot be shared, because its files contain local paths or a token. Remove them: "
            f"{listing(problems)}"
        )


def _unescape(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16)) if escape[1] else "/" if escape[2] == "/" else "\n"


# ---- Uploading


@dataclass(frozen=True)
class Upload:
    """is_private: the repository.    keeps_card: its card was written or edited by someone, so it is not replaced."""

    commit: "CommitInfo"
    is_private: bool
    keeps_card: bool


def upload(
    folder: Path,
    repo_id: str,
    *,
    tags: Sequence[str] = (),
    replace_card: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **options: Any,
) -> Upload:
    """Uploads the files of a folder as one commit. Creates the repository and the branch `revision` if necessary.

    A card in the repository that someone wrote or edited stays, unless `replace_card`.
    tags: added to a new card.    options: of `HfApi.upload_folder`.
    Raises ConfigError for a repository that is public but should be private, WriteError if the Hub refuses the files.
    """
    from huggingface_hub import HfApi, ModelCard

    api = HfApi(token=token)
    with hub_errors(WriteError, f"cannot upload the adapter to {repo_id!r}:"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_private = bool(api.model_info(repo_id).private)
        if private and not is_private:
            raise ConfigError(
                f"{repo_id} is public, so everyone would see the adapter. To upload it anyway, use --public, or "
                "private=None in Python"
            )
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keeps_card = False
        if not replace_card and api.file_exists(repo_id, CARD, revision=revision):
            card = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
            keeps_card = not is_written_by_tailora(card.read_bytes())
        for path in folder.rglob(CARD) if tags else ():
            card_with_tags = ModelCard.load(path)
            card_with_tags.data.tags = list(dict.fromkeys((*(card_with_tags.data.tags or ()), *tags)))
            card_with_tags.save(path)
            path.write_text(signed(SIGNATURE.sub("", path.read_text(encoding="utf-8"))), encoding="utf-8")
        ignored = CARD if keeps_card else None
        options = {"commit_message": "Upload LoRA adapter", **options, "ignore_patterns": ignored}
        commit: CommitInfo = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **options)
    return Upload(commit, is_private, keeps_card)


# ---- Base models


def is_at_hand(name: str) -> bool:
    """True for a base model that is on this machine: the demo's, a folder, or one in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if name == DEMO:
        return (demo_folder() / MODEL_NAME).is_dir()
    return (
        Path(name).is_dir()
        or gguf_file(name) is not None
        or (could_be_repository(name) and isinstance(try_to_load_from_cache(name, "config.json"), str))
    )


def find_gguf(name: str) -> Path | None:
    """Returns the GGUF file of a base model: a local one, or one of a Hub repository, downloaded once; None for others.

    `owner/name` is a repository without other weights and with a single GGUF file; `owner/name:Q4_K_M` selects the file
    whose name ends with this. Raises ConfigError if not exactly one file matches, and FetchError if it cannot be
    downloaded.
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
    matching = [file for file in files if file == ending or not ending or _ends(file, ending)]
    if len(matching) != 1:
        choices = ", ".join(f"{repository}:{_shortest_ending(file, files)}" for file in files) or "none"
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


def _ends(file: str, ending: str) -> bool:
    return re.search(rf"(^|[-./]){re.escape(ending)}$", file[: -len(SUFFIX)], re.IGNORECASE) is not None


def _shortest_ending(file: str, files: Sequence[str]) -> str:
    """Returns what to write for this file: Q4_K_M, or its whole name if that is not enough."""
    ending = re.split(r"[-./]", file[: -len(SUFFIX)])[-1]
    return ending if sum(_ends(other, ending) for other in files) == 1 else file


def check_model_exists(name: str) -> None:
    """Raises ConfigError for a model that is no folder, GGUF file or repository of the Hub, which is asked once.

    Without a network, transformers would try for most of a minute.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    errors: Any = import_module("huggingface_hub.errors")
    path = Path(name)
    if path.is_dir() or gguf_file(name):
        return
    if could_be_repository(repository := name.partition(":")[0]):
        name = repository  # of a GGUF file in it
    if path.is_file():
        raise ConfigError(f"model {name!r} is a file; use a folder, a GGUF file, a Hub id, or 'demo'")
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
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
def card_template() -> "Template":
    """Compiled once, because that takes longer than to write a small adapter."""
    from jinja2 import Template

    template: Template = Template(Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8"))
    return template


def is_written_by_tailora(card: bytes) -> bool:
    """False if a card was written, or edited, by someone else."""
    text = card.decode(errors="replace")
    signature = SIGNATURE.search(text)
    return signature is not None and signature["digest"] == _digest(text[: signature.start()])


def _digest(text: str) -> str:
    return sha256(" ".join(text.split()).encode()).hexdigest()[:16]
