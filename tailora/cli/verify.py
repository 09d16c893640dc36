"""`tailora verify URL --adapter FOLDER`: does that server really use this adapter?

`create_passport` makes the verification file that it needs, also for `train` and `export`.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveFloat
from rich.console import Console

from tailora.cli.flags import Json
from tailora.cli.main import GATE_NOT_MET, log, note, print_json, stderr, stdout
from tailora.cli.models import base_of, find_adapter, load_model
from tailora.cli.progress import counter
from tailora.cli.serve import API_KEY, Url
from tailora.errors import FormatError, require_packages
from tailora.formats.hub import is_at_hand
from tailora.formats.run_folder import ADAPTER, PASSPORT, read_system_message
from tailora.report.blocks import Paragraph, Section
from tailora.report.terminal import print_section
from tailora.verify.passport import Passport, read_passport, write_passport

if TYPE_CHECKING:
    from tailora.verify.server_verdict import Observation, Verification

Adapter = Annotated[str, Parameter(name="--adapter", help="adapter, run or export: folder or Hub id")]
ModelName = Annotated[
    str | None,
    Parameter(name="--model", help="the server's name of the adapter; default: the folder's name, or the only adapter"),
]
BaseName = Annotated[
    str | None,
    Parameter(
        name="--base", help="the server's name of the base, for comparison; default: the one in the server's list"
    ),
]
Timeout = Annotated[PositiveFloat, Parameter(help="seconds to wait for an answer")]

HEADLINES = {
    "adapter": "The server uses this adapter as it was trained.",
    "base": "The server answers like the bare base: the adapter is not in use.",
    "scaled": "The server uses this adapter at another scale: {scale:.2f} times that of training.",
    "other": "The server uses something else than this adapter as it was trained.",
    "unknown": "The answers do not show whether the server uses this adapter.",
}
ADVICE = {  # what to do next
    "base": "Load the adapter into the server, or name it with --model as the server does.",
    "scaled": "Compare the server's scale with lora_alpha, r and use_rslora in adapter_config.json.",
    "other": "If only the chats differ, the server uses another chat template: `tailora export --to SERVER` writes "
    "that of training. Otherwise check the base ({base_model}), layers that the server's log reports as skipped, and "
    "the adapter's file: the SHA-256 in {folder} is {hashes}. `tailora push` takes paths out of the file, so a copy "
    "from the Hub can have another SHA-256 with the same weights.",
    "unknown": "It would help if the server returned log-probabilities, kept the base in more bits, or offered the "
    "base along with the adapter (--base).",
}


def verify(
    url: Url,
    /,
    *,
    adapter: Adapter,
    model: ModelName = None,
    base: BaseName = None,
    timeout: Timeout = 120.0,
    json: Json = False,
) -> int:
    """Verify that a server really uses an adapter, and as it was trained.

    Sends the prompts of the adapter's verification file, passport.json, which export writes. If the adapter has none,
    it is written with the base model, where that is on this machine. Compares the server's log-probabilities with
    those of the adapter, the base, and common mistakes. The exit code is 0 if the server uses the adapter as trained,
    4 if it does not or that remains unknown, and 1 if it cannot be asked. The server's key is read from
    TAILORA_API_KEY.
    """
    require_packages("httpx", extra="serve")
    from tailora.verify import server_verdict
    from tailora.verify.server_client import ServerClient, check_model, choose_model

    with ServerClient(url, os.environ.get(API_KEY), timeout=timeout) as server:
        folder = find_adapter(adapter)
        folder = folder if folder.is_dir() else folder.parent
        passport = read_passport(folder) if (folder / PASSPORT).exists() else None
        resolved = folder.resolve()
        name = resolved.parent.name if resolved.name == ADAPTER else resolved.name
        models = server.models()
        model = choose_model(models, model, name)
        if base is not None:
            check_model(models, base, "--base")
        elif model is not None:
            base = models.get(model)
        names = [model] if base is None or base == model else [model, base]
        passport = passport or passport_of_adapter(folder)
        answers: list[list[Observation | None]] = []
        for asked in names:
            recipient = f"{'its base ' if answers else ''}{asked or ''}"
            log(f"sending {len(passport.probes)} prompts to {server.url} {recipient}".rstrip())
            with counter(stderr(), "prompts") as progress:
                answers.append(server.ask(passport.probes, asked, progress))
        for endpoint, reason in server.refusals.items():
            note(f"{endpoint} was left out: the server answers {reason}")
    result = server_verdict.verify(passport, *answers)
    if json:
        print_json({**asdict(result), "url": server.url, "model": model, "adapter": str(folder)})
    else:
        show(stdout(), result, passport, folder)
    return 0 if result.verdict == "adapter" else GATE_NOT_MET


def passport_of_adapter(folder: Path) -> Passport:
    """Writes passport.json for an adapter without one, with its base model.

    Raises FormatError if the base model is not on this machine, and DataError if nothing tells the adapter from it.
    """
    base = base_of(folder)
    if base is None or not is_at_hand(base.location):
        return read_passport(folder)  # which says how to write one
    loaded = load_model(base.location, {ADAPTER: folder}, quantize="none", device="cpu")
    from tailora.verify.probes import passport_obstacle

    if (reason := passport_obstacle(loaded.model)) is not None:
        raise FormatError(f"{folder} cannot be verified: {reason}")
    return create_passport(folder, loaded.model, loaded.tokenizer, name=ADAPTER)


def create_passport(folder: Path, model: Any, tokenizer: Any, **options: Any) -> Passport:
    """Writes passport.json for the adapter of a LoRAModel next to its weights, and shows the progress.

    options: of `make_passport`.    Raises DataError if the adapter can have none, and WriteError.
    """
    from tailora.verify.probes import make_passport

    log(f"writing {folder / PASSPORT}, for `tailora verify`")
    with counter(stderr(), "computations") as progress:
        system = read_system_message(folder)
        passport = make_passport(model, tokenizer, system=system, progress=progress, **options)
    write_passport(folder, passport)
    return read_passport(folder)


def show(console: Console, result: "Verification", passport: Passport, folder: Path) -> None:
    headline = HEADLINES[result.verdict].format(scale=result.scale)
    hashes = ", ".join(f"{name} {digest}" for name, digest in passport.weights.items())
    advice = ADVICE.get(result.verdict, "").format(
        base_model=passport.base_model or "that of training", folder=folder, hashes=hashes
    )
    sentences = [*result.evidence, *([advice] if advice else [])]
    print_section(console, Section(headline, "", [Paragraph(sentence) for sentence in sentences]))
