"""`tailora verify URL --adapter FOLDER`: does that server really use this adapter?"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveFloat
from rich.console import Console

from tailora.cli.flags import Json
from tailora.cli.main import GATE_NOT_MET, log, note, print_json, stderr, stdout
from tailora.cli.models import find_adapter
from tailora.cli.serve import API_KEY, Url
from tailora.errors import require_packages
from tailora.formats.run_folder import ADAPTER
from tailora.report.blocks import Paragraph, Section
from tailora.report.terminal import print_section
from tailora.verify.passport import Passport, read_passport

if TYPE_CHECKING:
    from tailora.verify.server_verdict import Verification

Adapter = Annotated[
    str, Parameter(name="--adapter", help="adapter, run or export with a passport.json: folder or Hub id")
]
ModelName = Annotated[
    str | None,
    Parameter(
        name="--model", help="what the server calls the adapter; default: the folder's name, or the only adapter"
    ),
]
BaseName = Annotated[
    str | None,
    Parameter(
        name="--base", help="what the server calls the base, which is asked too; default: as the server's list says"
    ),
]
Timeout = Annotated[PositiveFloat, Parameter(help="seconds to wait for an answer")]

HEADLINES = {
    "adapter": "The server uses this adapter as it was trained.",
    "base": "The server answers like the bare base: the adapter is not in use.",
    "scaled": "The server uses this adapter at another scale: {scale:.2f} times that of training.",
    "partial": "The server uses only a part of this adapter.",
    "template": "The server uses this adapter, but writes the prompt in another way than training did.",
    "other-base": "The server computes with another base model.",
    "other-adapter": "The server uses another adapter, or another version of this one.",
    "unknown": "It cannot be told whether the server uses this adapter.",
}
ADVICE = {  # what to do next
    "base": "Load the adapter into the server, or say by --model what the server calls it.",
    "scaled": "Compare the server's scale with lora_alpha, r and use_rslora in adapter_config.json.",
    "partial": "Look in the server's log for layers that it left out. `tailora export --to SERVER` merges what a "
    "server takes no adapter for.",
    "template": "Give the server the chat template of training: `tailora export --to SERVER` writes it, with the "
    "command that uses it.",
    "other-base": "The adapter was trained on {base_model}: give the server that model, in the same version.",
    "other-adapter": "Compare the server's file with that in {folder}, whose SHA-256 is: {hashes}. `tailora push` "
    "takes paths out of the file, so that a copy from the Hub can have another SHA-256 with the same weights.",
    "unknown": "It would help if the server told log-probabilities, kept the base in more bits, or offered the base "
    "beside the adapter (--base).",
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

    The server is asked the prompts of the adapter's passport.json, which training and export write, and its
    log-probabilities are compared with those of the adapter, of the base, and of what goes wrong. The exit code is 0 if
    the adapter is in use as trained, 4 if it is not or cannot be told, 1 if the server cannot be asked. The key of the
    server is read from TAILORA_API_KEY.
    """
    require_packages("httpx", extra="serve")
    from tailora.cli.progress import counter
    from tailora.verify import server_verdict
    from tailora.verify.server_client import ServerClient, check_model, choose_model

    with ServerClient(url, os.environ.get(API_KEY), timeout=timeout) as server:
        folder = find_adapter(adapter)
        folder = folder if folder.is_dir() else folder.parent
        passport = read_passport(folder)
        resolved = folder.resolve()
        name = resolved.parent.name if resolved.name == ADAPTER else resolved.name
        models = server.models()
        model = choose_model(models, model, name)
        if base is not None:
            check_model(models, base, "--base")
        elif model is not None:
            base = models.get(model)
        asked = f" as {model}" if model is not None else ""
        log(f"asking {server.url}{asked}: {len(passport.probes)} prompts")
        with counter(stderr(), "prompts") as progress:
            observations = server.ask(passport.probes, model, progress)
        of_base = None
        if base is not None and base != model:
            log(f"asking it as {base}, its base")
            with counter(stderr(), "prompts") as progress:
                of_base = server.ask(passport.probes, base, progress)
        for endpoint, reason in server.refusals.items():
            note(f"{endpoint} was left out, it answers {reason}")
    result = server_verdict.verify(passport, observations, of_base)
    if json:
        print_json({**result.to_dict(), "url": server.url, "model": model, "adapter": str(folder)})
    else:
        show(stdout(), result, passport, folder)
    return 0 if result.verdict == "adapter" else GATE_NOT_MET


def show(console: Console, result: "Verification", passport: Passport, folder: Path) -> None:
    headline = HEADLINES[result.verdict].format(scale=result.scale)
    hashes = ", ".join(f"{name} {digest}" for name, digest in passport.weights.items())
    advice = ADVICE.get(result.verdict, "").format(base_model=passport.base_model, folder=folder, hashes=hashes)
    sentences = [*result.evidence, *([advice] if advice else [])]
    print_section(console, Section(headline, "", [Paragraph(sentence) for sentence in sentences]))
