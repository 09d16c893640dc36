"""Adapters on the Hugging Face Hub: which folder a name means, how a folder is uploaded, and its model card."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from tailora.errors import ConfigError, FetchError, WriteError, listing, nearest
from tailora.formats.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    DIFFUSERS_WEIGHTS,
    GGUF_WEIGHTS,
    MLX_WEIGHTS,
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


def local_folder(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None, subfolder: str | None = None
) -> Path:
    """Returns the path that `source` means: a file or folder here, or else a repository `owner/name` of the Hub.

    The folder of a run stands for the adapter in it. Of a repository only the adapter's files are downloaded, once.
    revision: a branch, tag or commit. token: for a private repository.
    Raises FetchError if `source` could be a repository and the Hub has none, it holds no adapter, or the Hub cannot be
    reached and the files were not downloaded before.
    """
    if Path(source).exists() or not _could_be_repository(source):
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


def model_card(settings: Mapping[str, Any], about: str) -> str:
    """Returns README.md: what the Hub reads at its top, `about`, and the settings of adapter_config.json.

    The Hub refuses a commit whose base model is no repository, so a base that is a folder is named in the text alone.
    """
    from huggingface_hub import ModelCardData

    base = settings["base_model_name_or_path"]
    data = ModelCardData(
        base_model=base if base and _could_be_repository(base) and not Path(base).exists() else None,
        library_name="peft",
        pipeline_tag="text-generation" if settings["task_type"] == "CAUSAL_LM" else None,
        tags=["lora", "tailora"],
    )
    rows = [f"| {name} | {value} |" for name, value in _shown(settings).items()]
    table = "\n".join(["| setting | value |", "|---|---|", *rows])
    base_line = f"Base model: {base}\n\n" if base else ""
    return f"---\n{data.to_yaml()}\n---\n\n{about}\n\n{base_line}{table}\n"


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say something: neither None, off nor empty. Long lists are cut."""
    hidden = ("peft_type", "base_model_name_or_path", "inference_mode")
    shown = {}
    for name, value in settings.items():
        if name in hidden or value in (None, False, "none") or value in ([], {}):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown[name] = (text if len(text) <= 200 else f"{text[:200]}...").replace("|", "\\|")
    return shown


def _could_be_repository(name: str | Path) -> bool:
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
        cause = "the Hub cannot be reached (no network, a proxy, or HF_HUB_OFFLINE)"
        raise error_type(
            f"{what} {cause}; on a connected machine `hf download` fetches a folder to give here"
        ) from None
    except (HfHubHTTPError, LocalTokenNotFoundError, HFValidationError) as error:
        raise error_type(f"{what} {_first_line(error)}; {OF_HUB}") from None
    except HTTPError as error:
        raise error_type(f"{what} the Hub cannot be reached ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
