"""`tailora push` and `tailora pull`: an adapter to the Hugging Face Hub, and from it."""

import shlex
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tailora.cli.flags import Json, Overwrite
from tailora.cli.main import log, note, print_json, stdout
from tailora.cli.models import base_of, command_to_use
from tailora.errors import ConfigError, FormatError, nearest_path
from tailora.formats.hub import (
    Fetched,
    check_repository_name,
    check_token,
    commit_files,
    fetch,
    look_up,
    other_types,
    public_name,
    repository_of,
)
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
LOSS_CELLS = ("name", "before", "before_95", "after", "after_95")  # of the card's line on the held-out loss

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
        bool,
        Parameter(
            negative=(),
            show_default=False,
            help="also replace a card that someone wrote or edited",
        ),
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
        raise ConfigError(f"{folder} is not a folder{nearest_path(folder)}; give that of an adapter or of a run")
    if not message.strip():
        raise ConfigError("--message is empty, and the Hub takes no commit without a message: give one")
    base_name = public_base_name(path, model)
    check_token()
    log("checking the adapter")
    from tailora.formats.shared_files import check_nothing_private, shared_files
    from tailora.report.model_card import card_body, completed_card, read_report
    from tailora.train.memory import format_bytes

    shared = shared_files(path, base_name)
    passport = _shared_passport(path, shared.files[ADAPTER_WEIGHTS], base_name, samples=samples)
    check_nothing_private(path, passport, shared.secrets)
    report = read_report(path)
    if base_name is None:
        note("the files name no base model; give its Hub id with --model")
    elif repository_of(base_name) is None:
        note(f"the files call the base model {base_name}, which others cannot fetch; give its Hub id with --model")
    there = look_up(repository, revision)
    _check_visibility(repository, None if there is None else there.private, public=public)
    card = there.card if there is not None and there.card is not None else shared.card
    body = card_body(repository, shared.settings, shared.updates, report, samples=samples)
    text, is_kept = completed_card(card, shared.settings, body, license, replace=replace_card)
    files = {**shared.files, **passport, CARD: text.encode()}
    check_nothing_private(path, {CARD: files[CARD]}, shared.secrets)
    if is_kept:
        where = path / CARD if card is shared.card else f"the {CARD} of {repository}"
        note(f"the words of {where} stay, since someone wrote or edited them; --replace-card writes a new card")
    if left_behind := [name for name in shared.left_behind if name not in files]:
        note(f"not uploaded: {', '.join(left_behind)}")
    if there is None and (kinds := other_types(repository)):
        note(f"the Hub has a {' and a '.join(kinds)} of this name, too; the adapter becomes a model beside it")
    stale = [name for name in (PASSPORT,) if there is not None and name in there.files and name not in files]
    log(f"uploading {len(files)} files to {repository}")
    try:
        commit = commit_files(
            repository,
            files,
            new=there is None,
            private=not public,
            message=message,
            revision=revision,
            deleted=stale,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{repository} has all files or none; the same command uploads them again") from None
    names = sorted(files)
    if json:
        print_json({"repo": repository, "url": commit.url, "commit": commit.id, "files": names})
        return 0
    is_private = not public if there is None else there.private
    lines: list[Block] = [
        Table(
            [Column(""), Column("", numeric=True)], [(name, format_bytes(len(files[name]))) for name in sorted(files)]
        ),
        Paragraph(f"The repository is {'private' if is_private else 'public'}: {commit.url}"),
        Code(shlex.join(["tailora", "pull", repository]), title="To fetch it elsewhere:"),
    ]
    print_section(stdout(), Section(f"Uploaded to {repository}", "", lines))
    return 0


def public_base_name(adapter: Path, model: str | None) -> str | None:
    """Returns what others call the adapter's base model: `model` if given, a Hub id, "demo", or its folder's last name.

    None if the adapter names none. Raises ConfigError if `model` is no Hub id.
    """
    if model is not None:
        if repository_of(model) is None:
            raise ConfigError(f"--model {model}: give the base model's Hub id, owner/name")
        return model
    base = base_of(adapter)
    return None if base is None else public_name(str(base.folder or base.name))


def _shared_passport(folder: Path, weights: bytes, base_name: str | None, *, samples: bool) -> dict[str, bytes]:
    """Returns file name -> the passport for these weights, which differ from the folder's in their metadata alone.

    Empty if the folder has none, or if its probes are held-out data and `samples` are not shared. Raises FormatError
    for one to share that is damaged, of another version or of other weights, and for one that is not JSON.
    """
    from tailora.verify.passport import has_held_out_texts, passport_bytes, read_passport

    if not (folder / PASSPORT).exists() or (has_held_out_texts(folder) and not samples):
        return {}
    passport = read_passport(folder)
    hashes = {ADAPTER_WEIGHTS: sha256(weights).hexdigest()}
    return {PASSPORT: passport_bytes(replace(passport, base_model=base_name or passport.base_model, weights=hashes))}


def _check_visibility(repository: str, is_private: bool | None, *, public: bool) -> None:
    """is_private: None for a repository that is new. Raises ConfigError rather than show everyone an adapter."""
    if is_private is False and not public:
        raise ConfigError(f"{repository} is public: everyone would see the adapter. Give --public to upload it there")
    if is_private and public:
        note(f"{repository} stays private; its settings on the Hub make it public")


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
    fetched = fetch(repository, revision=revision, subfolder=subfolder)
    updates = check_fetched(repository, fetched)
    with replace_folder(output) as temporary:
        for name in fetched.files:
            shutil.copyfile(fetched.folder / name, temporary / name)
    from tailora.report.model_card import loss_in_card
    from tailora.train.model_loading import labels_of_adapter

    base, labels = base_of(output), labels_of_adapter(output)
    ranks = sorted({update.r for update in updates.updates.values()}) if updates else []
    card = (output / CARD).read_text(encoding="utf-8", errors="replace") if CARD in fetched.files else ""
    loss = loss_in_card(card)
    targets = sorted({path.rpartition(".")[2] for path in updates.updates} if updates else ())
    facts = {
        "base": None if base is None else base.name,
        "ranks": ranks,
        "targets": targets,
        "loss": dict(zip(LOSS_CELLS, loss, strict=True)) if loss else None,
    }
    if json:
        print_json(
            {"output_dir": str(output), "repo": repository, "commit": fetched.commit, "files": fetched.files, **facts}
        )
        return 0
    is_public = base is not None and repository_of(base.name) is not None
    base_name = base.name if base is not None and is_public else "BASE"
    rows = [
        ("base model", f"{'not named' if base is None else base.name}{'' if is_public else ': give it with --model'}"),
        ("rank", value_range(list(map(float, ranks)))),
        ("adapted layers", ", ".join(targets) or NONE),
        *([(loss[0], f"{loss[1]} before, {loss[3]} after, says its card")] if loss else []),
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


def check_fetched(repository: str, fetched: Fetched) -> "OfflineAdapter | None":
    """Returns the updates of what was fetched, if they can be read without the base model.

    Raises FormatError if a tensor is missing or not finite, or does not fit the settings.
    """
    from tailora.formats.shared_files import check_adapter, check_finite

    try:
        if fetched.files[0] in (ADAPTER_WEIGHTS, MLX_WEIGHTS):
            return check_adapter(fetched.folder)[1]
        if fetched.files[0] == GGUF_WEIGHTS:
            note(f"{GGUF_WEIGHTS} is checked when it is loaded, which needs the base model")
        else:
            check_finite(fetched.folder / fetched.files[0], read_safetensors(fetched.folder / fetched.files[0])[0])
    except FormatError as error:  # the folder is one of the Hub's cache
        message = str(error).replace(str(fetched.folder), repository)
        raise FormatError(f"{message}\nNothing is written. Whoever made the adapter has to upload it again.") from None
    return None
