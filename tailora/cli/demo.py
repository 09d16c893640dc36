"""`tailora demo`: `tailora train` on a small model and real conversations, both fetched once."""

from itertools import count
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tailora.cli.options import ConfigFile, Json, flags_of, settings

DEFAULTS: dict[str, Any] = {
    "model": "demo",
    "data": "demo",
    "output_dir": "outputs/demo",
    "learning_rate": 1e-3,
}
QUESTIONS = [
    "What would you do with a million dollars?",
    "Hi! What did you do this weekend?",
    "What kind of music do you like?",
]
FLAGS: Any = flags_of(DEFAULTS)
NONE_GIVEN = FLAGS()


def demo(
    *,
    config: ConfigFile = None,
    json: Json = False,
    flags: Annotated[FLAGS, Parameter(name="*")] = NONE_GIVEN,
) -> int:
    """Fine-tune a small model on real chats, and see what it changed. Takes the flags of `train`."""
    folder = Path(DEFAULTS["output_dir"])
    folder = folder if flags.resume_from_checkpoint else unused(folder)
    chosen = settings(flags, config, {**DEFAULTS, "output_dir": str(folder)})
    from tailora.cli.fit import fit  # torch from here on

    return fit(chosen, as_json=json, questions=QUESTIONS)


def unused(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist: no earlier run is overwritten."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return folder if not folder.exists() else next(path for path in numbered if not path.exists())
