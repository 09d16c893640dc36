"""`tailora verify URL --adapter FOLDER`: does the server really use this adapter?

`create_passport` writes the verification file, also for `export`.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveFloat
from rich.console import Console

from tailora.cli.flags import SWITCH, Json
from tailora.cli.main import log, note, print_json, stderr, stdout
from tailora.cli.models import base_of, find_adapter, load_model
from tailora.cli.progress import counter
from tailora.cli.serve import API_KEY, Url
from tailora.errors import GATE_NOT_MET, ConfigError, require_packages
from tailora.formats.hub import is_at_hand
from tailora.formats.run_folder import ADAPTER, PASSPORT, read_system_message
from tailora.report.blocks import Paragraph, Section
from tailora.report.terminal import print_section
from tailora.verify.passport import Passport, read_passport, write_passport

if TYPE_CHECKING:
    from tailora.verify.server_verdict import Observation, Verification

Adapter = Annotated[str, Parameter(help="adapter, training run or export: folder or Hub id")]
ModelName = Annotated[
    str | None, Parameter(help="name of the adapter on the server; default: the folder's name, or the only adapter")
]
BaseName = Annotated[
    str | None, Parameter(help="name of the base model on the server, for comparison; default: from the server's list")
]

HEADLINES = {
    "adapter": "The server uses this adapter as it was trained.",
    "base": "The server answers like the base model: the adapter is not in use.",
    "scaled": "The server uses this adapter at the wrong scale: {scale:.2f} times the scale used in training.",
    "other": "The server does not use this adapter as it was trained.",
    "unknown": "The answers do not show whether the server uses this adapter.",
}
ADVICE = {  # what to do next
    "base": "Load the adapter into the server, or pass the server's name for it with --model.",
    "scaled": "Compare the server's scale with lora_alpha, r and use_rslora in adapter_config.json. If it is right, "
    "check that the server's log reports no skipped layers, and that its adapter file is not an older one.",
    "other": "If only the chats differ, the server probably uses a different chat template; run `tailora export --to "
    "SERVER` to write the one used in training. Otherwise, check that the server loads the right base model "
    "({base_model}), that its log reports no skipped layers, and that its adapter file is the right one (SHA-256 in "
    "{folder}: {hashes}). A copy from the Hub can have a different SHA-256 with the same weights, because `tailora "
    "push` removes local paths from the file.",
    "unknown": "For a clearer result, let the server return log-probabilities, use a higher-precision base model, "
    "or also serve the base model (--base).",
}


def verify(
    url: Url | None = None,
    /,
    *,
    adapter: Adapter,
    prepare: Annotated[bool, SWITCH, Parameter(help="only write the verification file; URL is not needed")] = False,
    model: ModelName = None,
    base: BaseName = None,
    timeout: Annotated[PositiveFloat, Parameter(help="seconds to wait for each response")] = 120.0,
    json: Json = False,
) -> int:
    """Verify that a server really uses an adapter.

    Sends the prompts in the adapter's verification file, passport.json, and compares the server's log-probabilities
    with the expected values for the adapter, for the base model, and for other scales. `export` writes this file. If it
    is missing, it is created from the base model, which must be on this machine. `--prepare` only writes the file.
    Exit codes: 0 if the server uses the adapter as trained, 4 if it does not or the result is unclear, 1 if the server
    cannot be reached. Set TAILORA_API_KEY if the server requires a key.
    """
    if prepare:
        prepare_passport(find_folder(adapter))
        return 0
    if url is None:
        raise ConfigError("expected the address of a server, such as http://127.0.0.1:8000, or --prepare")
    require_packages("httpx", extra="serve")
    from tailora.verify import server_verdict
    from tailora.verify.server_client import ServerClient, check_model, choose_model

    with ServerClient(url, os.environ.get(API_KEY), timeout=timeout) as server:
        folder = find_folder(adapter)
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
        if passport is None:
            made_for = base_of(folder)
            can_load = made_for is not None and is_at_hand(made_for.location)
            passport = prepare_passport(folder) if can_load else read_passport(folder)  # or raises an error
        answers: list[list[Observation | None]] = []
        for asked in names:
            recipient = f"{'the base model' if answers else 'model'} {asked} at " if asked else ""
            log(f"sending {len(passport.probes)} prompts to {recipient}{server.url}")
            with counter(stderr(), "prompts") as progress:
                answers.append(server.ask(passport.probes, asked, progress))
        for endpoint, reason in server.refusals.items():
            note(f"{endpoint} was skipped: the server returned {reason}")
    result = server_verdict.verify(passport, *answers)
    if json:
        print_json({**asdict(result), "url": server.url, "model": model, "adapter": str(folder)})
    else:
        show(stdout(), result, passport, folder)
    return 0 if result.verdict == "adapter" else GATE_NOT_MET


def find_folder(adapter: str) -> Path:
    path = find_adapter(adapter)
    return path if path.is_dir() else path.parent


def prepare_passport(folder: Path) -> Passport:
    """Writes a new passport.json from the adapter's base model. Raises ConfigError without one, and DataError."""
    base = base_of(folder)
    if base is None:
        remedy = f"`tailora export {folder} --model BASE --to peft --output NEW_FOLDER`"
        raise ConfigError(f"{folder} does not name its base model; create the verification file with {remedy}")
    loaded = load_model(base.location, {ADAPTER: folder}, quantize="none", device="cpu")
    return create_passport(folder, loaded.model, loaded.tokenizer, name=ADAPTER)


def create_passport(folder: Path, model: Any, tokenizer: Any, **options: Any) -> Passport:
    """Writes passport.json next to the weights of an adapter. options: of `make_passport`. Raises as it does."""
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
        base_model=passport.base_model or "as in training", folder=folder, hashes=hashes
    )
    sentences = [*result.evidence, *([advice] if advice else [])]
    print_section(console, Section(headline, "", [Paragraph(sentence) for sentence in sentences]))
