"""Adapters on the Hugging Face Hub: which folder a name means, how files are uploaded and fetched, and the model card.

public_name             a base model -> what others call it, of which repository_of gives the Hub id
local_folder            a name -> the folder here, or the files of a repository, downloaded once; for all that load
upload                  a folder -> a repository; for `LoRAModel.push_to_hub`
look_up, commit_files   a repository as it is, and a commit to it; for `tailora push`
fetch                   a repository -> its adapter, card, passport and tokenizer; for `tailora pull`
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any

from tailora.errors import ConfigError, FetchError, TailoraWarning, WriteError, listing, nearest
from tailora.formats.io import demo_folder
from tailora.formats.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    DIFFUSERS_WEIGHTS,
    GGUF_WEIGHTS,
    MLX_WEIGHTS,
    PASSPORT,
    TOKENIZER_FILES,
    adapter_folder,
)

# What save_pretrained of PEFT and transformers takes: argument -> values that change nothing here, and what to do
# instead of another value. None instead of values: all.
SAVE_ARGUMENTS: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "safe_serialization": ((True,), "adapters are written as safetensors only"),
    "save_embedding_layers": (("auto", False), "trained embeddings are saved: name them in modules_to_save"),
    "path_initial_model_for_weight_conversion": ((None,), "an adapter of PiSSA or OLoRA is always saved as plain LoRA"),
    "state_dict": ((None,), "the model's own tensors are saved: leave it out"),
    "push_to_hub": ((False,), "call push_to_hub(repo_id)"),
    "max_shard_size": (None, ""),
    "save_function": (None, ""),
    "save_peft_format": ((True,), "the folder has PEFT's format"),
}
UPLOAD_OPTIONS = {"private", "token", "revision", "create_pr", "commit_message", "commit_description"}
# The files of an adapter's folder: of PEFT, mlx-lm, `export` to GGUF and diffusers. A pickle is not even downloaded.
WEIGHTS_OF_FORMATS = (ADAPTER_WEIGHTS, MLX_WEIGHTS, GGUF_WEIGHTS, DIFFUSERS_WEIGHTS)
FILES_OF_MODELS = ("config.json", "model_index.json")  # beside them, a file of any other name is no adapter
OF_HUB = "HF_TOKEN opens private and gated repositories"
TO_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
PIPELINE_TAGS = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")  # in the path of the Hub's cache
DEMO = "demo"  # the name of the demo's model and data, where a folder or a file is expected
MODEL_NAME = "SmolLM2-135M-Instruct"
DEMO_MODEL = f"HuggingFaceTB/{MODEL_NAME}"
OF_DEMO = "`demo` in tailora, whose weights are from a 4-bit file"  # so they differ a little from the Hub's

# At the end of a card that tailora wrote: while its text has this hash, nobody has edited it, and it may be replaced.
SIGNATURE = re.compile(r"<!-- written by tailora: (?P<digest>[0-9a-f]{16}) -->\s*\Z")
# What an earlier version wrote, without that comment
UNSIGNED = re.compile(
    r"\s*LoRA adapter of [^\n]* Loads with tailora[^\n]*\n\n(Base model: [^\n]*\n\n)?"
    r"\| setting \| value \|\n(\|[^\n]*\n)+\s*"
)


def name_of_model(name: str) -> str:
    """Returns "demo" for the folder of the demo's model; any other name as it is."""
    return DEMO if Path(name) == demo_folder() / MODEL_NAME else name


def public_name(base: str) -> str:
    """Returns what others call a base model: "demo", its Hub id, or else the last name of its folder here.

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
    """Returns the Hub id of what others call a base model; None for a folder."""
    if name == DEMO:
        return DEMO_MODEL
    return name if could_be_repository(name) else None


def local_folder(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None, subfolder: str | None = None
) -> Path:
    """Returns the path that `source` means: a file or folder here, or else a repository `owner/name` of the Hub.

    The folder of a run stands for the adapter in it. Of a repository only the adapter's files are downloaded, once.
    revision: a branch, tag or commit. token: for a private repository.
    Raises FetchError if `source` could be a repository and the Hub has none, it holds no adapter, or the Hub cannot be
    reached and the files were not downloaded before.
    """
    if Path(source).exists() or not could_be_repository(source):
        path = Path(source)
    else:
        with _hub_errors(FetchError, f"adapter {str(source)!r}: no such folder here, and"):
            path = _download(str(source), revision, token, subfolder)
    return path / subfolder if subfolder else adapter_folder(path)


def _download(repo_id: str, revision: str | None, token: str | bool | None, subfolder: str | None) -> Path:
    """Returns the folder with the adapter's files, which are those downloaded before if the Hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's or httpx2's
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        files = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except HfHubHTTPError:
        raise
    except (OfflineModeIsEnabled, HTTPError):
        try:
            return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError as error:
            if hasattr(error, "snapshot_path"):  # complete but for files that are not the adapter's
                return Path(error.snapshot_path)
            raise
    wanted = [escape(name) for name in _adapter_files(files, repo_id, subfolder)]
    return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted))


def _adapter_files(files: Sequence[str], repo_id: str, subfolder: str | None) -> list[str]:
    """Returns the repository's files that are the adapter in its subfolder. Raises FetchError if there is none."""
    folder = f"{subfolder.strip('/')}/" if subfolder else ""
    names = [name.removeprefix(folder) for name in files if name.startswith(folder)]
    weights = [name for name in WEIGHTS_OF_FORMATS if name in names][:1]
    if not weights and not any(name in names for name in FILES_OF_MODELS):
        weights = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if len(weights) == 1:
        return [folder + name for name in (*weights, ADAPTER_CONFIG) if name in names]
    at = f"{repo_id}{f' (subfolder {subfolder})' if subfolder else ''}"
    if weights:
        names_shown = ", ".join(weights[:5])
        raise FetchError(
            f"{at} on the Hub holds several files and none called {ADAPTER_WEIGHTS}: {names_shown}; fetch one with "
            f"`hf download {repo_id} {folder}{weights[0]}` and give its path"
        )
    pickled = (
        " but adapter_model.bin, a pickle, which can run code and is not read" if "adapter_model.bin" in names else ""
    )
    folders = {name.rpartition("/")[0] for name in files if name.rpartition("/")[2] in WEIGHTS_OF_FORMATS}
    hint = f"; there is one in: {', '.join(sorted(folders - {''})[:5])} (subfolder=...)" if folders - {""} else ""
    raise FetchError(f"{at} on the Hub holds no adapter{pickled}: none of {', '.join(WEIGHTS_OF_FORMATS)}{hint}")


def check_save_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError with all arguments of a `save_pretrained` that are unknown or would change what is written."""
    problems = []
    for name, value in arguments.items():
        if name not in SAVE_ARGUMENTS:
            problems.append(f"{name}: save_pretrained has no such argument{nearest(name, SAVE_ARGUMENTS)}")
        elif (values := SAVE_ARGUMENTS[name][0]) is not None and value not in values:
            problems.append(f"{name}={value!r}: {SAVE_ARGUMENTS[name][1]}")
    if problems:
        raise ConfigError(listing(problems))


def upload(
    folder: Path,
    repo_id: str,
    *,
    tags: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Uploads the files of a folder as one commit, and returns its address. Makes the repository if there is none.

    A model card that the repository has already stays as it is. Raises WriteError if the Hub does not take the files.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _hub_errors(WriteError, f"the adapter is not uploaded to {repo_id!r}:"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        has_card = api.file_exists(repo_id, CARD, revision=revision)
        if tags and not has_card:
            _add_tags(folder, tags)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload LoRA adapter",
            commit_description=commit_description,
            ignore_patterns=CARD if has_card else None,
        )
    return str(commit)


def _add_tags(folder: Path, tags: Sequence[str]) -> None:
    from huggingface_hub import ModelCard

    for path in folder.rglob(CARD):
        card = ModelCard.load(path)
        card.data.tags = list(dict.fromkeys((*(card.data.tags or ()), *tags)))
        card.save(path)


# ---- A repository as it is, a commit to it, and fetching it


@dataclass(frozen=True)
class Repository:
    """A repository of models, and the files of one of its revisions. card: README.md; None without one."""

    private: bool
    files: list[str]
    card: str | None


@dataclass(frozen=True)
class Commit:
    url: str
    id: str


def check_token() -> None:
    """Raises ConfigError if there is neither HF_TOKEN nor a saved login."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(f"the Hub takes files from a user that it knows, and there is no token here: {TO_LOG_IN}")


def check_repository_name(repo_id: str) -> None:
    """Raises ConfigError unless it is `owner/name` in the Hub's characters."""
    if not could_be_repository(repo_id):
        raise ConfigError(
            f"{repo_id!r} cannot be a repository: write owner/name, of letters, digits, '-', '_' and '.', with a name "
            "of at most 96 characters"
        )


def look_up(repo_id: str, revision: str | None) -> Repository | None:
    """Returns the repository at its branch `revision`, or at `main` if it has no such branch; None if there is none.

    A private repository of others looks as if there were none. Raises WriteError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    with _hub_errors(WriteError, _not_uploaded(repo_id)):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return None
        if revision is not None:
            with suppress(RevisionNotFoundError):  # a new branch begins at main
                info = api.model_info(repo_id, revision=revision)
        files = [file.rfilename for file in info.siblings or ()]
        card = None
        if CARD in files:
            path = Path(api.hf_hub_download(repo_id, CARD, revision=info.sha))
            try:
                card = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise WriteError(f"{_not_uploaded(repo_id)} its {CARD} is not UTF-8; save it as UTF-8 there") from None
    return Repository(bool(info.private), files, card)


def other_types(repo_id: str) -> list[str]:
    """Returns which of "dataset" and "space" the Hub has under this name. It keeps them and models apart."""
    from huggingface_hub import HfApi

    return [kind for kind in ("dataset", "space") if HfApi().repo_exists(repo_id, repo_type=kind)]


def commit_files(
    repo_id: str,
    files: Mapping[str, bytes],
    *,
    new: bool,
    private: bool,
    message: str,
    revision: str | None = None,
    deleted: Sequence[str] = (),
) -> Commit:
    """Uploads files, name -> content, as one commit, so that the repository gets all of them or none.

    new: there is no such repository, and it is made. revision: a branch, which is made if there is none.
    deleted: files of the repository that the same commit deletes.
    Raises WriteError if the Hub does not take them.
    """
    from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    operations: list[CommitOperation] = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in deleted]
    with _hub_errors(WriteError, _not_uploaded(repo_id)):
        if new:
            api.create_repo(repo_id, private=private)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            with warnings.catch_warnings(record=True) as remarks:  # of the Hub, on the card's YAML
                commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
        except HfHubHTTPError:
            raise
        except (ValueError, RuntimeError) as error:  # what the Hub says of the card's YAML; an upload that broke off
            causes = dict.fromkeys(" ".join(str(part).split()).rstrip(".") for part in (error, error.__cause__) if part)
            raise WriteError(
                f"{_not_uploaded(repo_id)} {': '.join(causes)}; nothing is committed, so try again"
            ) from None
    for remark in (remark for remark in remarks if issubclass(remark.category, UserWarning)):
        warnings.warn(" ".join(str(remark.message).split()), TailoraWarning, stacklevel=2)
    return Commit(commit.commit_url, commit.oid)


def _not_uploaded(repo_id: str) -> str:
    return f"the adapter is not uploaded to {repo_id!r}:"


@dataclass(frozen=True)
class Fetched:
    """folder: in the Hub's cache, with more files than these, maybe. files: names in it. commit: its id."""

    folder: Path
    files: list[str]
    commit: str


def fetch(repo_id: str, *, revision: str | None = None, subfolder: str | None = None) -> Fetched:
    """Downloads an adapter with its card, passport and tokenizer, and nothing else. Raises FetchError."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with _hub_errors(FetchError, f"{repo_id!r} is not fetched:"):
        try:
            info = api.model_info(repo_id, revision=revision)
        except RepositoryNotFoundError:
            if not (kinds := other_types(repo_id)):
                raise
            raise FetchError(f"{repo_id!r} is a {' and a '.join(kinds)} on the Hub, and no model or adapter") from None
        names = [file.rfilename for file in info.siblings or ()]
        wanted = _adapter_files(names, repo_id, subfolder)
        inside = f"{subfolder.strip('/')}/" if subfolder else ""
        wanted += [inside + name for name in (CARD, PASSPORT, *TOKENIZER_FILES) if inside + name in names]
        folder = snapshot_download(repo_id, revision=info.sha, allow_patterns=list(map(escape, wanted)))
    return Fetched(Path(folder, inside), [name.removeprefix(inside) for name in wanted], str(info.sha))


# ---- The model card


def model_card(settings: Mapping[str, Any], about: str) -> str:
    """Returns README.md: what the Hub reads at its top, `about`, and the settings of adapter_config.json.

    The Hub refuses a commit whose base model is no repository, so another base is named in the text alone: a folder by
    its last name.
    """
    from huggingface_hub import ModelCardData

    base = settings["base_model_name_or_path"]
    name = public_name(base) if base else ""
    repository = repository_of(name)
    data = ModelCardData(
        base_model=repository,
        library_name="peft",
        pipeline_tag=PIPELINE_TAGS.get(settings["task_type"]),
        tags=["lora", "tailora"],
    )
    rows = [f"| {name} | {value} |" for name, value in setting_rows(settings).items()]
    table = "\n".join(["| setting | value |", "|---|---|", *rows])
    remark = f" ({OF_DEMO})" if name == DEMO else ""
    if repository is None and name and (name != base or Path(name).exists()):  # else an old id of the Hub, as gpt2
        remark = ", a folder where the adapter was made"
    base_line = f"Base model: {repository or name}{remark}\n\n" if name else ""
    text = signed(f"{about}\n\n{base_line}{table}\n")
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def signed(text: str) -> str:
    """Returns the text of a card with a comment at its end, which no reader sees: tailora may replace this text."""
    return f"{text}\n<!-- written by tailora: {_digest(text)} -->\n"


def is_written_by_tailora(text: str) -> bool:
    """False if the text of a card was written, or edited, by someone else."""
    signature = SIGNATURE.search(text)
    if signature is None:
        return UNSIGNED.fullmatch(text) is not None
    return signature["digest"] == _digest(text[: signature.start()])


def _digest(text: str) -> str:
    return sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def setting_rows(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that say something: neither None, off nor empty. Long lists are cut."""
    hidden = ("peft_type", "base_model_name_or_path", "inference_mode")
    shown = {}
    for name, value in settings.items():
        if name in hidden or value in (None, False, "none") or value in ([], {}):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown[name] = (text if len(text) <= 200 else f"{text[:200]}...").replace("|", "\\|")
    return shown


def could_be_repository(name: str | Path) -> bool:
    """True for `owner/name` in the Hub's characters. A Path is always local."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not isinstance(name, str) or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@contextmanager
def _hub_errors(error_type: type[FetchError | WriteError], what: str) -> Iterator[None]:
    """Turns what the Hub's client raises into an error that says what happened and what to do."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's or httpx2's
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RepositoryNotFoundError:
        raise error_type(f"{what} the Hub has no such repository, or a private one; {OF_HUB}") from None
    except RevisionNotFoundError as error:
        raise error_type(f"{what} {_first_line(error)}; give a branch, tag or commit that exists") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        to_do = "; on a connected machine `hf download` fetches a folder to give here"
        cause = "the Hub cannot be reached (no network, a proxy, or HF_HUB_OFFLINE)"
        raise error_type(f"{what} {cause}{to_do if error_type is FetchError else ''}") from None
    except HfHubHTTPError as error:
        raise error_type(f"{what} {_refusal(error.response.status_code, error)}") from None
    except (LocalTokenNotFoundError, HFValidationError) as error:
        raise error_type(f"{what} {_first_line(error)}; {OF_HUB}") from None
    except (HTTPError, ConnectionError) as error:  # the second is that of the Hub's storage of large files
        raise error_type(f"{what} the Hub cannot be reached ({_first_line(error)})") from None


def _refusal(status: int, error: Any) -> str:
    """Returns what the Hub answered, and what to do."""
    said = f" ({error.server_message.strip().rstrip('.')})" if error.server_message else ""
    match status:
        case 401:
            return f"the Hub does not know this token{said}: {TO_LOG_IN}"
        case 403:
            return f"the token may not do this{said}; give one that may, in HF_TOKEN or with `hf auth login`"
        case 409:
            return f"the Hub has something under this name that this token cannot see{said}; give another name"
        case 429:
            return f"the Hub answers no more for now{said}; wait some minutes"
        case _:
            return f"{_first_line(error)}{said}; {OF_HUB}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
