"""Models and adapters on the Hugging Face Hub: which folder a name means, what is uploaded, and the model card.

public_name     a base model -> the name that others know it by, and repository_of: that name -> its Hub id
local_folder    a name -> a local folder; the adapter's files of a repository are downloaded once
download        a repository -> also its card, verification file and tokenizer, for `tailora pull`
shared_files    the files of an adapter that others may have, checked and without paths of this machine
upload          a folder -> one commit, for `tailora push` and `LoRAModel.push_to_hub`
model_card      README.md, from model_card.md.j2

`check_model_exists` looks for a base model before it is loaded.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailora.errors import ConfigError, FetchError, FormatError, TailoraError, WriteError, listing, nearest_path
from tailora.formats.io import check_is_file, demo_folder, safetensors_header, with_metadata, wrap_os_error
from tailora.formats.metadata import METADATA_KEY
from tailora.formats.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    DIFFUSERS_WEIGHTS,
    GGUF_WEIGHTS,
    MLX_WEIGHTS,
    MODEL,
    TOKENIZER_FILES,
    adapter_folder,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from torch import Tensor

# The weights of an adapter: of PEFT, mlx-lm, `export` to GGUF and diffusers. A pickle is not even downloaded.
WEIGHTS_OF_FORMATS = (ADAPTER_WEIGHTS, MLX_WEIGHTS, GGUF_WEIGHTS, DIFFUSERS_WEIGHTS)
FILES_OF_MODELS = ("config.json", "model_index.json")  # next to them, a file of any other name is no adapter
SHARED = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, *TOKENIZER_FILES)  # all that is uploaded, with the card and PASSPORT
REPOSITORY = re.compile(r"\b[\w.-]+\b/\b[\w.-]{1,96}\b", re.ASCII)  # as huggingface_hub checks it
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")  # in the path of the Hub's cache
DEMO = "demo"  # the name of the demo's model and data, where a folder or a file is expected
MODEL_NAME = "SmolLM2-135M-Instruct"
DEMO_MODEL = f"HuggingFaceTB/{MODEL_NAME}"
OF_DEMO = "`demo` in tailora, whose weights are from a 4-bit file"  # so they differ a little from the Hub's

MODEL_TIMEOUT = 5.0  # seconds for the answer whether the Hub has a model

# ---- Names


def name_of_model(name: str) -> str:
    """Returns "demo" for the folder of the demo's model; any other name as it is."""
    return DEMO if Path(name) == demo_folder() / MODEL_NAME else name


def public_name(base: str) -> str:
    """Returns the name that others know a base model by: "demo", its Hub id, or the last name of its folder.

    The folders of the Hub's cache have a Hub id, too.
    """
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


# ---- Downloading


@dataclass(frozen=True)
class Download:
    """folder: in the Hub's cache, maybe with more files than these.    files: names in it, the weights first."""

    folder: Path
    files: list[str]
    commit: str


def local_folder(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None, subfolder: str | None = None
) -> Path:
    """Returns the path that `source` means: a local file or folder, or else a repository `owner/name` of the Hub.

    The folder of a run stands for the adapter in it. Only the adapter's files of a repository are downloaded, once.
    revision: a branch, tag or commit. token: for a private repository.
    Raises FetchError if `source` could be a repository and the Hub has no adapter there, or if the Hub cannot be
    reached and the files were not downloaded before.
    """
    if Path(source).exists() or not could_be_repository(source):
        return Path(source, subfolder) if subfolder else adapter_folder(Path(source))
    with hub_errors(FetchError, f"adapter {str(source)!r}: no such folder here, and"):
        folder = download(str(source), revision=revision, token=token, subfolder=subfolder).folder
    return folder if subfolder else adapter_folder(folder)


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    others: Sequence[str] = (),
) -> Download:
    """Downloads the weights and settings of an adapter, and the `others` if the repository has them.

    Without network, the files that were downloaded before. Raises FetchError if there is no adapter, and what
    huggingface_hub raises.
    """
    from huggingface_hub import HfApi, snapshot_download

    inside = f"{subfolder.strip('/')}/" if subfolder else ""

    def fetch(*names: str) -> Path:
        patterns = [escape(inside + name) for name in names]
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))

    snapshot = fetch(*WEIGHTS_OF_FORMATS, ADAPTER_CONFIG, *others)
    folder = snapshot / inside
    names = [name for name in (*WEIGHTS_OF_FORMATS, ADAPTER_CONFIG, *others) if (folder / name).is_file()]
    if not {*names} & {*WEIGHTS_OF_FORMATS}:
        weights = _only_file(HfApi(token=token).list_repo_files(repo_id, revision=revision), repo_id, inside)
        fetch(weights)
        names.insert(0, weights)
    return Download(folder, names, snapshot.name)


def _only_file(files: Sequence[str], repo_id: str, inside: str) -> str:
    """Returns the name of the only safetensors file, in `inside`. Raises FetchError if there is none, or several."""
    names = [name.removeprefix(inside) for name in files if name.startswith(inside)]
    is_model = any(name in names for name in FILES_OF_MODELS)
    weights = [name for name in names if "/" not in name and name.endswith(".safetensors") and not is_model]
    if len(weights) == 1:
        return weights[0]
    at = f"{repo_id}{f' (subfolder {inside})' if inside else ''} on the Hub"
    if weights:
        raise FetchError(
            f"{at} has several files and none called {ADAPTER_WEIGHTS}: {', '.join(weights[:5])}; fetch one with "
            f"`hf download {repo_id} {inside}{weights[0]}` and give its path"
        )
    pickled = " but adapter_model.bin, a pickle, which can run code and is not read"
    folders = {name.rpartition("/")[0] for name in files if name.rpartition("/")[2] in WEIGHTS_OF_FORMATS} - {""}
    hint = f"; there is one in: {', '.join(sorted(folders)[:5])} (subfolder=...)" if folders else ""
    raise FetchError(
        f"{at} has no adapter{pickled if 'adapter_model.bin' in names else ''}: "
        f"none of {', '.join(WEIGHTS_OF_FORMATS)}{hint}"
    )


# ---- What is shared of an adapter's folder

# Words that only the tokenizer's vocabulary has are no paths
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
BEGIN, END = r"(?<![\w.~-])(?<![\w:.]/)", r"(?![\w-])[\w./@-]*"  # of a path; not within another one, or an address
HOME = BEGIN + r"(?:/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)[\w.@-]+[\w./\\@-]*"  # a home directory of any system
TOKEN = r"\bhf_[A-Za-z0-9]{30,}"  # of the Hub: some tools wrote it into the files of a tokenizer


@dataclass(frozen=True)
class SharedFiles:
    """settings: of adapter_config.json, with the base's public name.
    contents: file name -> content, without the card.
    secrets: paths of the base model on this machine, which no file may contain.
    """

    settings: dict[str, Any]
    contents: dict[str, bytes]
    secrets: list[str]


def shared_files(folder: Path, base_name: str | None) -> SharedFiles:
    """Returns the files of a PEFT folder that others may have. The folder does not change.

    base_name: the name for the base model, instead of a path.
    Raises FormatError for a folder that is not an adapter, is damaged, or whose files contain links, paths of this
    machine or tokens.
    """
    from tailora.formats.offline import read_stored, updates_of  # they import torch

    if (folder / MODEL).is_dir() and not (folder / ADAPTER_CONFIG).exists():
        raise FormatError(f"{folder} is a whole model, of --method full; `tailora extract` makes an adapter of it")
    others = [name for name in WEIGHTS_OF_FORMATS[1:] if (folder / name).is_file()]
    if others and not all((folder / name).is_file() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)):
        raise FormatError(
            f"{folder} has {others[0]}, and no {ADAPTER_WEIGHTS} with {ADAPTER_CONFIG} as PEFT writes them: "
            f"`tailora export {folder} --to peft --output FOLDER` writes them"
        )
    stored = read_stored(folder)
    check_finite(folder, stored.tensors)
    updates_of(stored)
    if stored.settings is None:
        raise FormatError(f"{folder} has no {ADAPTER_CONFIG}, without which PEFT and servers cannot read it")
    contents = {name: shared_content(folder / name) for name in SHARED if (folder / name).exists()}
    settings = {**stored.settings, "base_model_name_or_path": base_name}
    if settings != stored.settings:
        contents[ADAPTER_CONFIG] = (json.dumps(settings, indent=2) + "\n").encode()
    metadata = safetensors_header(contents[ADAPTER_WEIGHTS]).get("__metadata__", {})
    if stored.metadata.base_folder is not None:
        metadata[METADATA_KEY] = stored.metadata.model_copy(update={"base_folder": None}).to_json()
        contents[ADAPTER_WEIGHTS] = with_metadata(contents[ADAPTER_WEIGHTS], metadata)
    bases = (stored.settings.get("base_model_name_or_path"), stored.metadata.base_folder)
    secrets = [base for base in bases if isinstance(base, str) and Path(base).is_absolute()]
    texts = {name: content for name, content in contents.items() if name != ADAPTER_WEIGHTS}
    texts[f"the metadata of {ADAPTER_WEIGHTS}"] = json.dumps(metadata).encode()
    check_nothing_private(folder, texts, secrets)
    return SharedFiles(settings, contents, secrets)


def shared_content(path: Path) -> bytes:
    """Returns the content of a file. Raises FormatError for a link, which could lead to any file of this machine."""
    check_is_file(path)
    if path.is_symlink():
        raise FormatError(f"{path} is a link, and only files of the folder itself are uploaded: replace it with a copy")
    with wrap_os_error(path):
        return path.read_bytes()


def make_public(folder: Path) -> None:
    """Replaces the files of a PEFT folder by those that others may have. Raises as `shared_files`."""
    from tailora.formats.peft import read_peft_folder

    stored = read_peft_folder(folder)
    base = stored.metadata.base_folder or (stored.settings or {}).get("base_model_name_or_path")
    for name, content in shared_files(folder, public_name(base) if base else None).contents.items():
        (folder / name).write_bytes(content)


def check_finite(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Raises FormatError, which names `path` and all tensors with NaN or infinity."""
    if problems := [f"{key} is not finite" for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise FormatError(f"{path}: {listing(problems)}")


def check_nothing_private(folder: Path, files: Mapping[str, bytes], secrets: Sequence[str] = ()) -> None:
    """Raises FormatError with the tokens and the paths of a machine in these files.

    The paths are those below a home directory, `folder`, the current folder, and `secrets`.
    """
    here = [str(path) for path in (Path.home(), Path.cwd(), folder.resolve()) if len(path.parts) > 1]
    paths = [*(f"{BEGIN}{re.escape(path)}{END}" for path in (*here, *secrets)), HOME]
    problems = []
    for name, content in files.items():
        pattern = TOKEN if name in VOCABULARY else "|".join([*paths, TOKEN])
        if private := re.findall(pattern, _without_escapes(content)):
            problems.append(f"{name} contains {', '.join(list(dict.fromkeys(private))[:3])}")
    if problems:
        raise FormatError(
            f"{folder} is not shared, because its files contain paths of a machine, or a token; remove them: "
            f"{listing(problems)}"
        )


def _without_escapes(content: bytes) -> str:
    """Returns the text; of JSON, with escapes such as \\u002f written out."""
    text = content.decode(errors="replace")
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


# ---- Uploading

UPLOAD_OPTIONS = {"private", "token", "revision", "create_pr", "commit_message", "commit_description"}


def upload(
    folder: Path,
    repo_id: str,
    *,
    tags: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    keep_card: bool = True,
    commit_message: str | None = None,
    **options: Any,
) -> "CommitInfo":
    """Uploads the files of a folder as one commit. Creates the repository and the branch `revision` if necessary.

    tags: added to a new card.    keep_card: a card that the repository has already stays.
    options: of `HfApi.upload_folder`.
    Raises WriteError if the Hub refuses the files.
    """
    from huggingface_hub import HfApi, ModelCard

    api = HfApi(token=token)
    with hub_errors(WriteError, not_uploaded(repo_id)):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        has_card = keep_card and api.file_exists(repo_id, CARD, revision=revision)
        for path in folder.rglob(CARD) if tags and not has_card else ():
            card = ModelCard.load(path)
            card.data.tags = list(dict.fromkeys((*(card.data.tags or ()), *tags)))
            card.save(path)
        commit: CommitInfo = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload LoRA adapter",
            ignore_patterns=CARD if has_card else None,
            **options,
        )
    return commit


def not_uploaded(repo_id: str) -> str:
    return f"the adapter is not uploaded to {repo_id!r}:"


TO_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
STATUS = {  # of the Hub's answer -> what it means, and what to do
    401: ("the Hub does not know this token", TO_LOG_IN),
    403: ("the token may not do this", "use one that may, in HF_TOKEN or with `hf auth login`"),
    429: ("the Hub accepts no more requests for now", "wait some minutes"),
}


@contextmanager
def hub_errors(error_type: type[FetchError | WriteError], what: str) -> Iterator[None]:
    """Turns what the Hub's client raises into an error that says what happened and what to do."""
    errors: Any = import_module("huggingface_hub.errors")  # its HTTPError is httpx's or httpx2's
    try:
        yield
    except TailoraError:  # some of them are OSErrors or ValueErrors
        raise
    except errors.RepositoryNotFoundError:
        cause = "the Hub has no such repository, or a private one; HF_TOKEN opens private and gated repositories"
        raise error_type(f"{what} {cause}") from None
    except errors.RevisionNotFoundError as error:
        raise error_type(f"{what} {_first_line(error)}; give a branch, tag or commit that exists") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        to_do = "; on a connected machine `hf download` fetches a folder to give here"
        cause = "the Hub cannot be reached (no network, a proxy, or HF_HUB_OFFLINE)"
        raise error_type(f"{what} {cause}{to_do if error_type is FetchError else ''}") from None
    except errors.HfHubHTTPError as error:
        said = f" ({error.server_message.strip().rstrip('.')})" if error.server_message else ""
        cause, to_do = STATUS.get(error.response.status_code, (_first_line(error), "try again later"))
        raise error_type(f"{what} {cause}{said}: {to_do}") from None
    except (errors.HTTPError, ConnectionError) as error:  # the second is that of the Hub's storage of large files
        raise error_type(f"{what} the Hub cannot be reached ({_first_line(error)})") from None
    except (ValueError, RuntimeError) as error:  # a name or YAML that the client refuses; an upload that broke off
        causes = [" ".join(str(part).split()).rstrip(".") for part in (error, error.__cause__) if part]
        raise error_type(f"{what} {': '.join(dict.fromkeys(causes))}; nothing is committed, so try again") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


# ---- Base models


def check_model_exists(name: str) -> None:
    """Asks the Hub once for a model that is not on this machine. Raises ConfigError unless it is there.

    Without a network, transformers would ask for most of a minute before it gives up.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    errors: Any = import_module("huggingface_hub.errors")
    path = Path(name)
    if path.is_file():
        raise ConfigError(f"model {name!r} is a file, not a model folder: give a folder, a Hub id, or 'demo'")
    if path.is_dir():
        return
    remedy = "Give a folder, a Hub id such as owner/name, or 'demo'; HF_TOKEN opens private and gated models"
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=MODEL_TIMEOUT)
        return
    except errors.RepositoryNotFoundError:
        cause = "the Hub has no such model, or a private one"
    except errors.HfHubHTTPError:
        return  # the Hub answers, but is busy: transformers asks again
    except errors.HFValidationError:
        cause = "it is not a Hub id"
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        cause = f"the Hub cannot be reached ({_first_line(error)})"
    hint = nearest_path(path, folders_only=True) or "."
    raise ConfigError(f"model {name!r}: no such folder here, and {cause}{hint} {remedy}")


# ---- The model card

PIPELINE_TAGS = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
# At the end of a card that tailora wrote. While the card has this hash, nobody has edited it, and it may be replaced.
SIGNATURE = re.compile(r"<!-- written by tailora: (?P<digest>[0-9a-f]{16}) -->\s*\Z")


def model_card(settings: Mapping[str, Any], about: str, license_name: str | None = None, **parts: Any) -> str:
    """Returns README.md: what the Hub reads at its top, `about`, and the settings of adapter_config.json.

    The Hub refuses a commit whose base model is no repository, so another base is named in the text alone: a folder by
    its last name.
    parts: other variables of model_card.md.j2; its `more_settings` are added to the table.
    """
    from huggingface_hub import ModelCard, ModelCardData

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
        remark = ", a folder where the adapter was made"
    rows = {**setting_rows(settings), **parts.pop("more_settings", {})}
    card = ModelCard.from_template(
        data,
        str(Path(__file__).with_name("model_card.md.j2")),
        **{"about": about, "base": f"{repository or name}{remark}" if name else "", "settings": rows, **parts},
    )
    text = str(card).rstrip()
    return f"{text}\n\n<!-- written by tailora: {_digest(text)} -->\n"  # which no reader sees


def is_written_by_tailora(card: str) -> bool:
    """False if a card was written, or edited, by someone else."""
    signature = SIGNATURE.search(card)
    return signature is not None and signature["digest"] == _digest(card[: signature.start()])


def _digest(text: str) -> str:
    return sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def setting_rows(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings that are neither None, off nor empty. Long lists are cut."""
    hidden = ("peft_type", "base_model_name_or_path", "inference_mode")
    shown = {}
    for name, value in settings.items():
        if name in hidden or value in (None, False, "none") or value in ([], {}):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown[name] = text if len(text) <= 200 else f"{text[:200]}..."
    return shown
