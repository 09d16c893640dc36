"""`tailora push` and `tailora pull`: upload an adapter to the Hugging Face Hub, and download one."""

import shlex
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tailora.cli.flags import Json, Overwrite
from tailora.cli.main import log, note, print_json, stdout
from tailora.cli.models import base_of, command_to_use
from tailora.errors import ConfigError, FetchError, FormatError, WriteError, nearest_path
from tailora.formats import hub
from tailora.formats.io import read_safetensors, replace_folder
from tailora.formats.run_folder import (
    ADAPTER_WEIGHTS,
    CARD,
    EXPORTED_FILES,
    GGUF_WEIGHTS,
    MLX_WEIGHTS,
    PASSPORT,
    TOKENIZER_FILES,
    adapter_folder,
    check_result_folder,
)
from tailora.report.blocks import Block, Code, Column, Paragraph, Section, Table
from tailora.report.format import NONE, value_range
from tailora.report.terminal import print_section

if TYPE_CHECKING:
    from tailora.formats.offline import OfflineAdapter

PULLED_FILES = (*EXPORTED_FILES, *TOKENIZER_FILES)
MESSAGE = "Upload a LoRA adapter with tailora"

Repository = Annotated[str, Parameter(name="repository", help="repository of the Hub, owner/name")]

# ---- `tailora push`


def push(
    folder: Annotated[Path, Parameter(help="folder of an adapter, or of the run that made it")],
    repository: Repository,
    /,
    *,
    public: Annotated[
        bool, Parameter(negative=(), show_default=False, help="let everyone see a new repository; default: you alone")
    ] = False,
    message: Annotated[str, Parameter(help="message of the commit")] = MESSAGE,
    revision: Annotated[str | None, Parameter(help="branch to commit to; made if there is none; default: main")] = None,
    model: Annotated[
        str | None, Parameter(help="what the files call the base model: its Hub id, if it was a folder here")
    ] = None,
    license: Annotated[str | None, Parameter(help="license of the adapter, such as apache-2.0, for its card")] = None,
    samples: Annotated[
        bool,
        Parameter(negative=(), show_default=False, help="show the run's answers to held-out prompts in the card"),
    ] = False,
    replace_card: Annotated[
        bool, Parameter(negative=(), show_default=False, help="also replace a card that someone wrote or edited")
    ] = False,
    json: Json = False,
) -> int:
    """Upload an adapter to the Hugging Face Hub, with a model card.

    A new repository is private. Everything is checked before anything is sent, and all files come in one commit.
    Samples, logs, data and paths of this machine stay here.
    """
    check_repository_name(repository)
    path = adapter_folder(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder} is not a folder{nearest_path(folder)}; pass the folder of an adapter or of a run")
    if not message.strip():
        raise ConfigError("--message is empty, but every commit on the Hub needs a message")
    base_name = public_base_name(path, model)
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(f"the Hub only accepts files from known users, and there is no token here: {hub.TO_LOG_IN}")
    log("checking the adapter")
    from tailora.report.model_card import run_card
    from tailora.train.memory import format_bytes

    shared = hub.shared_files(path, base_name)
    passport = shared_passport(path, shared.contents[ADAPTER_WEIGHTS], base_name, samples=samples)
    own_card = read_card(path / CARD)
    new_card = run_card(repository, path, shared.settings, license, samples=samples)
    if base_name is None:
        note("the files name no base model; give its Hub id with --model")
    elif hub.repository_of(base_name) is None:
        note(f"the files call the base model {base_name}, which others cannot fetch; give its Hub id with --model")
    hub.check_nothing_private(path, passport, shared.secrets)
    is_private, hub_card = look_up(repository, revision)
    if is_private is False and not public:
        raise ConfigError(f"{repository} is public: everyone would see the adapter. Give --public to upload it there")
    if is_private and public:
        note(f"{repository} stays private; its settings on the Hub make it public")
    card = hub_card or own_card
    if card is None or replace_card or hub.is_written_by_tailora(card):
        card = new_card
    else:
        where = f"the {CARD} of {repository}" if hub_card else path / CARD
        note(f"{where} stays, because someone wrote or edited it; --replace-card writes a new card")
    files = {**shared.contents, **passport, CARD: card.encode()}
    hub.check_nothing_private(path, {CARD: files[CARD]}, shared.secrets)
    if left_behind := sorted({file.name for file in path.iterdir()} - files.keys()):
        note(f"not uploaded: {', '.join(left_behind)}")
    log(f"uploading {len(files)} files to {repository}")
    visibility = None if is_private is not None else not public
    try:
        with TemporaryDirectory() as temporary:
            for name, content in files.items():
                Path(temporary, name).write_bytes(content)
            commit = hub.upload(
                Path(temporary),
                repository,
                private=visibility,
                revision=revision,
                keep_card=False,
                commit_message=message,
                delete_patterns=None if PASSPORT in files else PASSPORT,  # of earlier weights
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{repository} has all files or none; the same command uploads them again") from None
    if json:
        print_json({"repo": repository, "url": commit.commit_url, "commit": commit.oid, "files": sorted(files)})
        return 0
    sizes = [(name, format_bytes(len(files[name]))) for name in sorted(files)]
    lines: list[Block] = [
        Table([Column(""), Column("", numeric=True)], sizes),
        Paragraph(f"The repository is {'private' if is_private or visibility else 'public'}: {commit.commit_url}"),
        Code(shlex.join(["tailora", "pull", repository]), title="To fetch it elsewhere:"),
    ]
    print_section(stdout(), Section(f"Uploaded to {repository}", "", lines))
    return 0


def check_repository_name(repo_id: str) -> None:
    """Raises ConfigError unless it is `owner/name` in the Hub's characters."""
    if not hub.could_be_repository(repo_id):
        raise ConfigError(
            f"{repo_id!r} cannot be a repository: write owner/name, of letters, digits, '-', '_' and '.', with a name "
            "of at most 96 characters"
        )


def public_base_name(adapter: Path, model: str | None) -> str | None:
    """Returns what others call the adapter's base model: `model` if given, a Hub id, "demo", or its folder's last name.

    None if the adapter names none. Raises ConfigError if `model` is no Hub id.
    """
    if model is not None:
        if hub.repository_of(model) is None:
            raise ConfigError(f"--model {model}: give the base model's Hub id, owner/name")
        return model
    base = base_of(adapter)
    return None if base is None else hub.public_name(str(base.folder or base.name))


def shared_passport(folder: Path, weights: bytes, base_name: str | None, *, samples: bool) -> dict[str, bytes]:
    """Returns file name -> the passport for these weights, which differ from the folder's in their metadata alone.

    Empty if the folder has none, or if its probes are held-out data and `samples` are not shared. Raises FormatError
    for one to share that is damaged, of another version or of other weights, and for one that is not JSON.
    """
    from tailora.verify.passport import has_held_out_texts, passport_bytes, read_passport

    if not (folder / PASSPORT).exists() or (has_held_out_texts(folder) and not samples):
        return {}
    hub.shared_content(folder / PASSPORT)  # refuses a link
    passport = read_passport(folder)
    hashes = {ADAPTER_WEIGHTS: sha256(weights).hexdigest()}
    return {PASSPORT: passport_bytes(replace(passport, base_model=base_name or passport.base_model, weights=hashes))}


def read_card(path: Path) -> str | None:
    """Returns the text of a card; None if there is none. Raises FormatError for a link or other than UTF-8."""
    try:
        return hub.shared_content(path).decode() if path.exists() else None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def look_up(repository: str, revision: str | None) -> tuple[bool | None, str | None]:
    """Returns whether the repository is private, and its card in the branch, which starts at main if it is new.

    None instead of what does not exist. A private repository of others looks as if it did not exist.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub.hub_errors(WriteError, hub.not_uploaded(repository)):
        if not api.repo_exists(repository):
            return None, None
        if revision is not None and not api.revision_exists(repository, revision):
            revision = None
        is_private = bool(api.model_info(repository).private)
        if not api.file_exists(repository, CARD, revision=revision):
            return is_private, None
        return is_private, Path(api.hf_hub_download(repository, CARD, revision=revision)).read_text(encoding="utf-8")


# ---- `tailora pull`


def pull(
    repository: Repository,
    /,
    *,
    output_dir: Annotated[
        Path | None, Parameter(help="new folder for the adapter; default: the repository's name")
    ] = None,
    revision: Annotated[str | None, Parameter(help="branch, tag or commit; default: main")] = None,
    subfolder: Annotated[str | None, Parameter(help="folder in the repository that holds the adapter")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Fetch an adapter from the Hugging Face Hub into a folder.

    Only its weights, settings, card, passport and tokenizer are fetched, and no pickles. They are checked first.
    """
    check_repository_name(repository)
    output = Path(repository.rpartition("/")[2]) if output_dir is None else output_dir
    check_result_folder(output, PULLED_FILES, overwrite=overwrite)
    log(f"fetching {repository}")
    with hub.hub_errors(FetchError, f"{repository!r} is not fetched:"):
        others = (CARD, PASSPORT, *TOKENIZER_FILES)
        fetched = hub.download(repository, revision=revision, subfolder=subfolder, others=others)
    updates = check_fetched(repository, fetched)
    with replace_folder(output) as temporary:
        for name in fetched.files:
            shutil.copyfile(fetched.folder / name, temporary / name)
    from tailora.train.model_loading import labels_of_adapter

    base, labels = base_of(output), labels_of_adapter(output)
    ranks = sorted({update.r for update in updates.updates.values()}) if updates else []
    targets = sorted({path.rpartition(".")[2] for path in updates.updates} if updates else ())
    if json:
        facts = {"base": None if base is None else base.name, "ranks": ranks, "targets": targets}
        where = {"output_dir": str(output), "repo": repository, "commit": fetched.commit, "files": fetched.files}
        print_json({**where, **facts})
        return 0
    is_public = base is not None and hub.repository_of(base.name) is not None
    base_name = base.name if base is not None and is_public else "BASE"
    rows = [
        ("base model", f"{'not named' if base is None else base.name}{'' if is_public else ': give it with --model'}"),
        ("rank", value_range(list(map(float, ranks)))),
        ("adapted layers", ", ".join(targets) or NONE),
        ("files", ", ".join(fetched.files)),
    ]
    commands = [command_to_use(base_name, str(output), labels)]
    if labels is None:
        commands.append(["tailora", "serve", "--model", base_name, "--adapter", f"{output.resolve().name}={output}"])
    contents: list[Block] = [
        Table([Column(""), Column("")], rows),
        Code("\n".join(map(shlex.join, commands)), title="To use it:"),
    ]
    print_section(stdout(), Section(f"{repository}, commit {fetched.commit[:7]}, is in {output}", "", contents))
    return 0


def check_fetched(repository: str, fetched: hub.Download) -> "OfflineAdapter | None":
    """Returns the updates of what was fetched; None for formats that cannot be read without the base model.

    Raises FormatError if a tensor is missing or not finite, or does not fit the settings.
    """
    from tailora.formats.offline import read_stored, updates_of

    weights = fetched.files[0]
    try:
        if weights in (ADAPTER_WEIGHTS, MLX_WEIGHTS):
            stored = read_stored(fetched.folder)
            hub.check_finite(fetched.folder, stored.tensors)
            return updates_of(stored)
        if weights != GGUF_WEIGHTS:
            hub.check_finite(fetched.folder / weights, read_safetensors(fetched.folder / weights)[0])
    except FormatError as error:  # the folder is one of the Hub's cache
        message = str(error).replace(str(fetched.folder), repository)
        raise FormatError(f"{message}\nNothing is written. Whoever made the adapter has to upload it again.") from None
    return None
