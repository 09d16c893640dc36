"""`tailora demo`: `tailora train` on a small model and real conversations, both fetched once."""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tailora.cli.flags import ConfigFile, Json, flags_of, settings
from tailora.errors import CheckpointError, ConfigError

DEFAULTS: dict[str, Any] = {
    "model": "demo",
    "data": "demo",
    "learning_rate": 1e-3,
}
FOLDER = Path("outputs/demo")
QUESTIONS = [
    "What would you do with a million dollars?",
    "Hi! What did you do this weekend?",
    "What kind of music do you like?",
]
DEMO_FLAGS: Any = flags_of({**DEFAULTS, "output_dir": str(FOLDER)})
NO_DEMO_FLAGS = DEMO_FLAGS()


def demo(
    *,
    config: ConfigFile = None,
    json: Json = False,
    flags: Annotated[DEMO_FLAGS, Parameter(name="*")] = NO_DEMO_FLAGS,
) -> int:
    """Fine-tune a small model on real chats, and see what it changed. Takes the flags of `train`."""
    chosen = settings(flags, config, DEFAULTS)
    if "output_dir" not in chosen.config.model_fields_set:
        folder = output_folder(chosen.config.resume_from_checkpoint)
        chosen = replace(chosen, config=chosen.config.model_copy(update={"output_dir": str(folder)}))
    from tailora.cli.fit import fit  # torch from here on

    return fit(chosen, as_json=json, questions=QUESTIONS)


def output_folder(resumed: str | None) -> Path:
    """Where a demo writes that was not told where: a new folder, or the one of the checkpoint it goes on from.

    Raises ConfigError where several processes would each take a folder.
    """
    if resumed is not None:
        return newest(FOLDER) if resumed == "latest" else Path(resumed).parent
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes must write to one folder: give --output-dir")
    return next(path for path in numbered(FOLDER) if made(path))


def numbered(folder: Path) -> Iterator[Path]:
    """`folder`, folder-2, folder-3, ..."""
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in count(2))


def made(folder: Path) -> bool:
    """Makes the folder, unless it exists: no earlier run is overwritten, and none that starts at the same time."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def newest(folder: Path) -> Path:
    """The one of `folder`, folder-2, ... whose last checkpoint was written last. Raises CheckpointError."""
    from tailora.train.checkpoint import found  # torch

    folders = [path for path in (folder, *folder.parent.glob(f"{folder.name}-*")) if path.is_dir()]
    written = [(found(path)[-1].stat().st_mtime, path) for path in folders if found(path)]
    if not written:
        raise CheckpointError(
            f"--resume-from-checkpoint latest: no {folder}, {folder}-2, ... holds a checkpoint; "
            "give the folder of a checkpoint, or start without it and with --save-steps"
        )
    return max(written)[1]
