"""Publishing an adapter on the Hugging Face Hub.

shared_files            the files of an adapter to publish, without paths of this machine
check_nothing_private   refuses tokens and local paths in them
upload                  a folder -> one commit, for `tailora push` and `LoRAModel.push_to_hub`
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailora.errors import ConfigError, FormatError, WriteError, listing
from tailora.formats.hub import SIGNATURE, hub_errors, is_written_by_tailora, public_name, signed
from tailora.formats.io import check_is_file, safetensors_header, with_metadata, wrap_os_error
from tailora.formats.offline import stored_updates
from tailora.formats.peft import read_peft_folder
from tailora.formats.run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, METADATA_KEY, SYSTEM, TOKENIZER_FILES

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

SHARED = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, SYSTEM, *TOKENIZER_FILES)  # uploaded, along with the card and PASSPORT
UPLOAD_OPTIONS = {"private", "token", "revision", "create_pr", "commit_message", "commit_description"}

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
    stored = read_peft_folder(folder)
    stored_updates(stored)
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
        cause = "its files contain local paths or a token. Remove them"
        raise FormatError(f"{folder} cannot be shared, because {cause}: {listing(problems)}")


def _unescape(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16)) if escape[1] else "/" if escape[2] == "/" else "\n"


# ---- Uploading


@dataclass(frozen=True)
class Upload:
    commit: "CommitInfo"
    is_private: bool  # the repository
    keeps_card: bool  # because someone wrote or edited it


def upload(
    folder: Path,
    repo_id: str,
    *,
    tags: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **options: Any,
) -> Upload:
    """Uploads the files of a folder as one commit. Creates the repository and the branch `revision` if necessary.

    A card in the repository that someone wrote or edited stays.
    tags: added to a new card.
    options: of `HfApi.upload_folder`.
    Raises ConfigError for a repository that is public but should be private, WriteError if the Hub refuses the files.
    """
    from huggingface_hub import HfApi, ModelCard

    api = HfApi(token=token)
    with hub_errors(WriteError, f"cannot upload the adapter to {repo_id!r}:"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_private = bool(api.model_info(repo_id).private)
        if private and not is_private:
            remedy = "use --public, or private=None in Python"
            raise ConfigError(f"{repo_id} is public, so everyone would see the adapter. To upload it anyway, {remedy}")
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keeps_card = False
        if api.file_exists(repo_id, CARD, revision=revision):
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
