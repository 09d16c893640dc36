"""`tailora train`."""

from typing import Annotated, Any

from cyclopts import Parameter

from tailora.cli.flags import ConfigFile, Json, flags_of, settings

FLAGS: Any = flags_of({})
NONE_GIVEN = FLAGS()


def train(
    *,
    config: ConfigFile = None,
    json: Json = False,
    flags: Annotated[FLAGS, Parameter(name="*")] = NONE_GIVEN,
) -> int:
    """Fine-tune a model on your data; `tailora data FILE` shows beforehand what it would learn from."""
    chosen = settings(flags, config, {})
    from tailora.cli.fit import fit  # torch from here on

    return fit(chosen, as_json=json)
