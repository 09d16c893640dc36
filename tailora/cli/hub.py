"""`tailora push` and `tailora pull`: upload and download adapters of the Hugging Face Hub."""

import json as json_module
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tailora.cli.flags import SWITCH, Json, Overwrite
from tailora.cli.main import log, note, print_json, stdout
from tailora.cli.models import base_of, command_to_use
from tailora.errors import ConfigError, FetchError, FormatError, nearest_path
from tailora.formats import hub
from tailora.formats.io import read_safetensors, replace_folder
from tailora.formats.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    EXPORTED_FILES,
    GGUF_WEIGHTS,
    MLX_WEIGHTS,
    PASSPORT,
    SYSTEM,
    TOKENIZER_FILES,
    adapter_folder,
    check_result_folder,
)
from tailora.report.blocks import Block, Code, Column, Paragraph, Section, Table
from tailora.report.format import NONE, value_range
from tailora.report.terminal import print_section

if TYPE_CHECKING:
    from tailora.core.low_rank import Update

PULLED_FILES = (*EXPORTED_FILES, *TOKENIZER_FILES)
MESSAGE = "Upload a LoRA adapter with tailora"
KEPT_CARD = "is kept, because it was written or edited by hand; delete it for a new one"

Repository = Annotated[str, Parameter(name="repository", help="repository on the Hub: owner/name")]

# ---- `tailora push`


def push(
    folder: Annotated[Path, Parameter(help="folder of an adapter or of its training run")],
    repository: Repository,
    /,
    *,
    public: Annotated[bool, SWITCH, Parameter(help="create a public repository instead of a private one")] = False,
    message: Annotated[str, Parameter(help="commit message")] = MESSAGE,
    revision: Annotated[str | None, Parameter(help="branch to commit to, created if needed; default: main")] = None,
    model: Annotated[
        str | None,
        Parameter(help="Hub id of the base model, written into the files; set it if training used a local folder"),
    ] = None,
    license: Annotated[str | None, Parameter(help="license for the model card, such as apache-2.0")] = None,
    samples: Annotated[bool, SWITCH, Parameter(help="include answers to held-out prompts in the card")] = False,
    json: Json = False,
) -> int:
    """Upload an adapter to the Hugging Face Hub, with a model card.

    New repositories are private by default. All files are checked first and uploaded in one commit. Logs, data
    and local paths are not uploaded. Samples are not uploaded unless --samples is given.
    """
    from tailora.formats.upload import upload

    check_push(folder, repository, model)
    log("checking the adapter")
    path = adapter_folder(folder)
    files = files_to_push(path, repository, model, license, samples=samples)
    if left_behind := sorted({file.name for file in path.iterdir()} - files.keys()):
        note(f"not uploaded: {', '.join(left_behind)}")
    log(f"uploading {len(files)} files to {repository}")
    delete = None if PASSPORT in files else PASSPORT  # of earlier weights
    with TemporaryDirectory() as temporary:
        for name, content in files.items():
            Path(temporary, name).write_bytes(content)
        options: dict[str, Any] = {"commit_message": message, "delete_patterns": delete}
        uploaded = upload(Path(temporary), repository, private=not public, revision=revision, **options)
    if uploaded.is_private and public:
        note(f"{repository} is still private; make it public in its settings on the Hub")
    if uploaded.keeps_card:
        del files[CARD]
        note(f"the {CARD} of {repository} {KEPT_CARD}")
    commit = uploaded.commit
    if json:
        print_json({"repo": repository, "url": commit.commit_url, "commit": commit.oid, "files": sorted(files)})
        return 0
    contents: list[Block] = [
        Paragraph(f"The repository is {'private' if uploaded.is_private else 'public'}: {commit.commit_url}"),
        Paragraph(f"Files: {', '.join(sorted(files))}"),
        Code(shlex.join(["tailora", "pull", repository]), title="To download it elsewhere:"),
    ]
    print_section(stdout(), Section(f"Uploaded to {repository}", "", contents))
    return 0


def check_push(folder: Path, repository: str, model: str | None) -> None:
    """Raises ConfigError for arguments that cannot work, and without a token."""
    from huggingface_hub import get_token

    check_repository_name(repository)
    if not adapter_folder(folder).is_dir():
        raise ConfigError(f"{folder} is not a folder{nearest_path(folder)}; pass the folder of an adapter or of a run")
    if model is not None and hub.repository_of(model) is None:
        raise ConfigError(f"--model {model}: expected the base model's Hub id, owner/name")
    if get_token() is None:
        raise ConfigError("uploading to the Hub needs an access token: log in with `hf auth login`, or set HF_TOKEN")


def check_repository_name(repo_id: str) -> None:
    if not hub.could_be_repository(repo_id):
        raise ConfigError(f"invalid repository {repo_id!r}: expected owner/name, such as user/adapter")


def files_to_push(
    adapter: Path, repository: str, model: str | None, license_name: str | None, *, samples: bool
) -> dict[str, bytes]:
    """Returns name -> content of all files to upload. Raises FormatError if a file is damaged, private or a link.

    model: public name of the base model; default: the name in the adapter, without local paths.
    """
    from tailora.formats.upload import check_nothing_private, shared_content, shared_files
    from tailora.report.model_card import run_card
    from tailora.verify.passport import passport_bytes, read_passport

    files, base = shared_files(adapter, model)
    settings = json_module.loads(files[ADAPTER_CONFIG])
    if (base_name := settings["base_model_name_or_path"]) is None:
        note("the adapter does not name its base model; set its Hub id with --model")
    elif hub.repository_of(base_name) is None:
        note(f"others cannot download the adapter's base model {base_name}; set its Hub id with --model")
    if (adapter / PASSPORT).exists():
        shared_content(adapter / PASSPORT)  # refuses a link
        passport = read_passport(adapter)
        hashes = {ADAPTER_WEIGHTS: sha256(files[ADAPTER_WEIGHTS]).hexdigest()}
        passport = replace(passport, base_model=base_name or passport.base_model, weights=hashes)
        files[PASSPORT] = passport_bytes(passport)
    files[CARD] = run_card(repository, adapter, settings, license_name, samples=samples).encode()
    if (adapter / CARD).exists():
        own_card = shared_content(adapter / CARD)
        if not hub.is_written_by_tailora(own_card):
            files[CARD] = own_card
            note(f"{adapter / CARD} {KEPT_CARD}")
    check_nothing_private(adapter, files, base)
    return files


# ---- `tailora pull`


def pull(
    repository: Repository,
    /,
    *,
    output_dir: Annotated[
        Path | None, Parameter(help="new folder for the adapter; default: the repository's name")
    ] = None,
    revision: Annotated[str | None, Parameter(help="branch, tag or commit; default: main")] = None,
    subfolder: Annotated[str | None, Parameter(help="folder of the adapter within the repository")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Download an adapter from the Hugging Face Hub.

    Downloads and checks only the weights, settings, model card, verification file and tokenizer, never pickles.
    """
    check_repository_name(repository)
    output = Path(repository.rpartition("/")[2]) if output_dir is None else output_dir
    check_result_folder(output, PULLED_FILES, overwrite=overwrite)
    log(f"downloading {repository}")
    with hub.hub_errors(FetchError, f"cannot download {repository!r}:"):
        others = (CARD, PASSPORT, SYSTEM, *TOKENIZER_FILES)
        snapshot, files = hub.download(repository, revision=revision, subfolder=subfolder, others=others)
    weights, *_ = paths = [snapshot / file for file in files]
    updates = check_fetched(repository, weights)
    with replace_folder(output) as temporary:
        for path in paths:
            shutil.copyfile(path, temporary / path.name)
    from tailora.train.model_loading import labels_of_adapter

    base, names = base_of(output), [path.name for path in paths]
    ranks = sorted({update.r for update in updates.values()})
    targets = sorted({path.rpartition(".")[2] for path in updates})
    if json:
        facts = {"base": None if base is None else base.name, "ranks": ranks, "targets": targets}
        print_json({"output_dir": str(output), "repo": repository, "commit": snapshot.name, "files": names, **facts})
        return 0
    rows = [
        ("base model", "not named" if base is None else base.name),
        ("rank", value_range(list(map(float, ranks)))),
        ("adapted layers", ", ".join(targets) or NONE),
        ("files", ", ".join(names)),
    ]
    public_base = base.name if base is not None and hub.repository_of(base.name) is not None else "BASE"
    use = command_to_use(public_base, str(output), labels_of_adapter(output))
    contents: list[Block] = [Table([Column(""), Column("")], rows), Code(shlex.join(use), title="To use it:")]
    print_section(stdout(), Section(f"Downloaded {repository} (commit {snapshot.name[:7]}) to {output}", "", contents))
    return 0


def check_fetched(repository: str, weights: Path) -> "Mapping[str, Update]":
    """Returns the updates by path; none for formats that need the base. Raises FormatError for damaged tensors."""
    from tailora.formats.offline import read_offline

    try:
        if weights.name in (ADAPTER_WEIGHTS, MLX_WEIGHTS):
            return read_offline(weights.parent).updates
        if weights.name != GGUF_WEIGHTS:
            read_safetensors(weights)
    except FormatError as error:  # show the repository instead of the cache folder
        message = str(error).replace(str(weights.parent), repository)
        raise FormatError(f"{message}\nNothing was written. The adapter's author needs to upload it again.") from None
    return {}
