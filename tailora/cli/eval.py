"""`tailora eval`: how good an adapter is on held-out data, beside its base, and gates on what must hold."""

import json as jsonlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt

from tailora.cli.console import logs, note, print_json, results
from tailora.cli.derived import Base, base_name
from tailora.cli.models import Quantize, load, named, recorded
from tailora.cli.options import Json, flags_of, settings
from tailora.cli.scored import judged, progress, refused, show
from tailora.errors import ConfigError
from tailora.measure.metrics import METRICS, SHELL, Gate, check_gates, parse_gates, parse_metrics

if TYPE_CHECKING:
    from tailora.measure.scores import Scores

FLAGS: Any = flags_of({}, only=["field", "max_length", "dtype"])
NONE_GIVEN = FLAGS()
KIND, REPORT = "eval", "report.json"
NOT_MET = 4

Data = Annotated[str | None, Parameter(help="held-out data: JSONL, JSON, CSV, Parquet, folder or Hub id, or 'demo'")]
Gates = Annotated[
    list[str] | None,
    Parameter(
        name="--gate", negative=(), metavar="METRIC<N", help=f"or exit code 4; <=, >, >= too; repeatable; {SHELL}"
    ),
]
Metrics = Annotated[
    list[str] | None,
    Parameter(name="--metrics", negative=(), metavar="A,B", help=f"{', '.join(METRICS)}; default: what the data has"),
]
Normalize = Annotated[
    str, Parameter(metavar="A,B", help="before answers are compared: case, punctuation, space, strip; or none")
]


@dataclass(frozen=True)
class Subject:
    """What is judged."""

    model: str
    adapter: str | None  # as given
    folder: Path | None  # of the adapter itself


def eval(
    adapter: Annotated[str | None, Parameter(help="folder of an adapter, or of the run that made it")] = None,
    /,
    *,
    data: Data = None,
    model: Base = None,
    metrics: Metrics = None,
    gate: Gates = None,
    base: Annotated[bool, Parameter(help="judge the base beside the adapter")] = True,
    normalize: Normalize = "strip",
    max_new_tokens: Annotated[PositiveInt, Parameter(help="longest answer, for exact_match")] = 128,
    samples: Annotated[NonNegativeInt, Parameter(help="answers to show, for exact_match")] = 3,
    limit: Annotated[PositiveInt | None, Parameter(help="only the first so many rows")] = None,
    quantize: Quantize = None,
    output_dir: Annotated[Path | None, Parameter(help="folder for report.json")] = None,
    json: Json = False,
    flags: Annotated[FLAGS, Parameter(name="*")] = NONE_GIVEN,
) -> int:
    """Judge an adapter on held-out data, beside its base. Without an adapter, judge --model alone."""
    gates, names = parse_gates(gate or []), parse_metrics(metrics or [])
    asked = subject(adapter, model)
    check_gates(gates, base=base and asked.folder is not None)
    if data is None:
        raise ConfigError("nothing to judge by: give --data FILE")
    _check_folder(output_dir)
    longest = None if asked.folder is None else recorded(asked.folder, "max_length")
    chosen = settings(flags, None, {"max_length": longest} if longest else {}, {"model": asked.model}).config
    from tailora.measure.exact import normaliser  # torch from here on
    from tailora.measure.scores import Asked, bare, score
    from tailora.train.memory import explained

    how = Asked(
        metrics=tuple(names),
        also=tuple(each.metric for each in gates),
        max_length=chosen.max_length,
        max_new_tokens=max_new_tokens,
        normalize=() if normalize == "none" else tuple(normalize.split(",")),
        limit=limit,
        shown=samples,
    )
    normaliser(how.normalize)
    started = time.monotonic()
    with explained("evaluating", lambda: LIGHTER):
        loaded = load(asked.model, [] if adapter is None or asked.folder is None else [adapter], quantize, chosen.dtype)
        _warn_of_trained_data(asked, data)
        with progress(logs()) as heard:
            found = score(
                loaded.model if loaded.adapters else bare(loaded.model),
                loaded.tokenizer,
                data,
                how,
                field=chosen.field,
                base=base,
                note=note,
                heard=heard,
            )
    return _told(asked, found, gates, time.monotonic() - started, output_dir, json)


LIGHTER = (
    "what helps: a smaller --max-length, --quantize nf4, --dtype bfloat16, a smaller --model, closing other programs"
)


def subject(adapter: str | None, model: str | None) -> Subject:
    """What was asked for. Raises ConfigError, FormatError."""
    if adapter is None:
        if model is None:
            raise ConfigError("nothing to judge: give an ADAPTER, or --model M to judge a model without one")
        return Subject(model, None, None)
    path = Path(adapter)
    whole = next((each for each in (path, path / "model") if (each / "config.json").is_file()), None)
    if whole is not None and not (path / "adapter_config.json").exists():
        if model is not None:
            raise ConfigError(f"{adapter} is a whole model, not an adapter for {model}: leave one of the two out")
        return Subject(str(whole), None, None)
    (folder,) = named([adapter]).values()
    return Subject(base_name(model, [folder]), adapter, folder)


def _check_folder(folder: Path | None) -> None:
    """Raises ConfigError where a report of something else would be lost."""
    if folder is None or not (folder / REPORT).exists():
        return
    try:
        kind = jsonlib.loads((folder / REPORT).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind != KIND:
        raise ConfigError(f"--output-dir {folder} holds a {REPORT} of something else; give another folder")


def _warn_of_trained_data(asked: Subject, data: str) -> None:
    """A loss on what was trained on says little."""
    from tailora.data.demo import resolve

    trained = None if asked.folder is None else recorded(asked.folder, "data")
    if not isinstance(trained, str):
        return
    mine, theirs = resolve(data, "eval_data"), resolve(trained, "data")
    if mine == theirs or (Path(mine).exists() and Path(theirs).exists() and Path(mine).samefile(theirs)):
        note(f"the adapter was trained on {data}, so what is measured on it will look too good")


def _told(
    asked: Subject, found: "Scores", gates: Sequence[Gate], seconds: float, folder: Path | None, as_json: bool
) -> int:
    """Prints and writes what was found; the exit code."""
    from tailora.formats.atomic import write_file
    from tailora.measure.scores import plain

    outcomes = judged(gates, found.values())
    payload = {
        "model": asked.model,
        "adapter": asked.adapter,
        **plain(found),
        "gates": outcomes,
        "seconds": seconds,
    }
    if folder is not None:
        content = jsonlib.dumps({"kind": KIND, **payload}, indent=1, allow_nan=False)
        write_file(folder / REPORT, content.encode())
    if as_json:
        print_json(payload)
    else:
        show(results(), asked.adapter or asked.model, found, outcomes)
    refused(logs(), outcomes)
    return NOT_MET if any(not each["met"] for each in outcomes) else 0
