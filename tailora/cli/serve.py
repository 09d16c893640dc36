"""`tailora serve`: a base model and many adapters with OpenAI's API. `tailora playground`: a page for any server."""

import os
import socket
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, Port, PositiveFloat, PositiveInt
from cyclopts.validators import Number

from tailora.cli.main import log, note
from tailora.cli.models import Adapters, Device, Loaded, Model, Quantize, base_model_name, load_model, parse_adapters
from tailora.errors import ConfigError, nearest_path, require_packages
from tailora.formats.run_folder import ADAPTER_CONFIG, adapter_folder, read_system_message, recorded_settings

if TYPE_CHECKING:
    from tailora.engine.interface import Engine
    from tailora.serve.app import ServerSettings

API_KEY, ADMIN_KEY = "TAILORA_API_KEY", "TAILORA_ADMIN_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")
SHORTEST_DEFAULT = 131_072  # positions, if the model does not define their number

AdaptersFolder = Annotated[
    Path | None, Parameter(help="folder of adapters to serve; clients can also load adapters added to it later")
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    engine: Annotated[
        Literal["auto", "continuous", "padded"], Parameter(help="batching: continuous, or one padded batch at a time")
    ] = "auto"
    max_requests: Annotated[
        PositiveInt, Parameter(help="number of responses generated at the same time; further ones wait")
    ] = 32
    max_queue: Annotated[
        PositiveInt, Parameter(help="number of responses running or waiting; further ones are rejected with 429")
    ] = 256
    max_tokens: Annotated[
        PositiveInt | None, Parameter(help="maximum tokens per response that a client may request")
    ] = None
    adapter_memory: Annotated[
        PositiveFloat | None, Parameter(help="memory limit for adapters in GB; default: no limit")
    ] = None
    max_image_megapixels: Annotated[
        float, Parameter(help="maximum million pixels of an image in a request", validator=Number(gt=0, lte=64))
    ] = 16.0
    drain_seconds: Annotated[
        NonNegativeFloat, Parameter(help="seconds to wait at shutdown for running requests to finish")
    ] = 30.0


DEFAULT_FLAGS = ServerFlags()


def serve(
    *,
    model: Model = None,
    adapter: Adapters = None,
    adapters: AdaptersFolder = None,
    host: Annotated[str, Parameter(help="address to listen on; 0.0.0.0 for all interfaces")] = "127.0.0.1",
    port: Annotated[Port, Parameter(help="port to listen on")] = 8000,
    name: Annotated[
        str | None, Parameter(help="name of the base model for clients; default: the name of --model")
    ] = None,
    flags: ServerFlags = DEFAULT_FLAGS,
    quantize: Quantize = None,
    device: Device = "auto",
) -> int:
    """Serve a model and any number of adapters with an OpenAI-compatible API.

    The `model` field of a request selects the base model or an adapter, which may have a scale, as in legal@0.5;
    requests in one batch may use different adapters. Set TAILORA_API_KEY to require a key from clients, and
    TAILORA_ADMIN_KEY to require one for loading and unloading adapters.
    """
    require_packages("fastapi", "uvicorn", "prometheus_client", "httpx", "llguidance", extra="serve")
    from tailora.data.schemas import SEQ2SEQ
    from tailora.train.model_loading import check_writes_text, label_task_of_adapter, task_of_adapter

    api_key, admin_key = key_from(API_KEY), key_from(ADMIN_KEY)
    given = parse_adapters(adapter or [])
    for path in given.values():
        check_writes_text(str(path), label_task_of_adapter(path))
    in_folder = {} if adapters is None else {k: v for k, v in adapters_in(adapters).items() if k not in given}
    folders = given | in_folder
    model = base_model_name(model, list(folders.values()))
    with listen(host, port) as listener, ExitStack() as stack:  # before loading the model, which takes long
        log("loading the model")
        loaded = load_model(model, {}, quantize=quantize, device=device)
        if not loaded.model.config.is_encoder_decoder:
            in_folder = skip_adapters(in_folder, task_of_adapter, [SEQ2SEQ], "they need an encoder-decoder base model")
            folders = given | in_folder
        from tailora.serve.app import create_app, run_server
        from tailora.serve.registry import AdapterRegistry

        engine = new_engine(loaded, flags)
        stack.callback(engine.stop)
        files = Path(model) if Path(model).exists() else None  # a folder, or a GGUF file
        name = name or (files.resolve().name if files else model)  # clients do not see local paths
        system = read_system_message(files) if files and files.is_dir() else None
        budget = None if flags.adapter_memory is None else int(flags.adapter_memory * 1e9)
        registry = AdapterRegistry(engine.adapter_set, engine.paused, name, adapters, budget, system)
        engine.start()
        for adapter_name, folder in folders.items():
            registry.load(adapter_name, folder, trusted=True)
        if host not in LOCAL and not api_key:
            log(f"note: anyone who can reach {host} can use this server; set {API_KEY} to require a key")
        log(f"models: {', '.join([name, *folders])}")
        report_systems({name: system, **{named.name: named.system for named in registry.list()}}, folders)
        log(f"listening at {address(host, listener)} (open it in a browser to try the model); press Ctrl-C to stop")
        settings = server_settings(flags, host, api_key, admin_key)
        run_server(create_app(engine, registry, loaded.tokenizer, settings), listener, log)
    return 0


def server_settings(flags: ServerFlags, host: str, api_key: str | None, admin_key: str | None) -> "ServerSettings":
    from tailora.serve.app import ServerSettings
    from tailora.serve.playground import LOCAL_HOSTS

    return ServerSettings(
        max_queue=flags.max_queue,
        max_tokens=flags.max_tokens,
        max_image_pixels=round(flags.max_image_megapixels * 1e6),
        drain_seconds=flags.drain_seconds,
        allowed_hosts=LOCAL_HOSTS if host in LOCAL else ("*",),  # other sites must not reach a local server
        api_key=api_key,
        admin_key=admin_key,
    )


def new_engine(loaded: Loaded, flags: ServerFlags) -> "Engine":
    """Returns an engine that has not been started."""
    from tailora.core.adapter_set import AdapterSet
    from tailora.data.tokenize import stop_ids
    from tailora.engine.continuous_batching import ContinuousEngine, make_engine
    from tailora.engine.interface import positions_of_short_factors
    from tailora.train.generate import free_positions
    from tailora.train.memory import keep_freed_memory

    keep_freed_memory(loaded.model.device)
    positions = min(free_positions(loaded.model, 0), SHORTEST_DEFAULT)
    if (most := positions_of_short_factors(loaded.model.config) or positions) < positions:
        note(f"requests may have at most {most:,} tokens: a longer one would change the answers in its batch")
        positions = most
    engine = make_engine(
        AdapterSet(loaded.model, {}),
        stop_ids(loaded.model, loaded.tokenizer),
        flags.engine,
        max_positions=positions,
        max_requests=flags.max_requests,
        note=note,
    )
    what = "continuous batching" if isinstance(engine, ContinuousEngine) else "one padded batch at a time"
    log(f"engine: {what}; {flags.max_requests} responses at a time, up to {engine.max_positions:,} tokens each")
    return engine


def report_systems(systems: dict[str, str | None], folders: dict[str, Path]) -> None:
    """Notes which models use their system message from training, and which have no common one."""
    if added := [name for name, system in systems.items() if system is not None]:
        note(f"requests to {', '.join(added)} without a system message use the one from training")
    recorded = {name: recorded_settings(adapter_folder(folder), "data") for name, folder in folders.items()}
    differ = [
        name for name, data in recorded.items() if systems[name] is None and data.get("messages", {}).get("system")
    ]
    if differ:
        note(f"the training examples of {', '.join(differ)} have different system messages; send one with each request")


def key_from(variable: str) -> str | None:
    """Returns the key in an environment variable, None if it is not set. Raises ConfigError if it is empty."""
    key = os.environ.get(variable)
    if key is not None and not key.strip():
        raise ConfigError(f"{variable} is empty; set it to a key, or unset it to require no key")
    return key


def listen(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}; change --port") from None
    # asyncio does not set this for an existing socket; without it, answers on open connections take 40 ms longer
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def adapters_in(folder: Path) -> dict[str, Path]:
    """Returns name -> folder of the adapters and runs in a folder that generate text.

    Raises ConfigError if there is no such folder.
    """
    from tailora.train.config import TASK_TYPES
    from tailora.train.model_loading import label_task_of_adapter

    if not folder.is_dir():
        hint = nearest_path(folder, folders_only=True) or "; expected a folder with adapters or runs"
        raise ConfigError(f"--adapters {folder} is not a folder{hint}")
    paths = [path for path in sorted(folder.iterdir()) if (adapter_folder(path) / ADAPTER_CONFIG).is_file()]
    adapters = {path.name: path for path in paths}
    return skip_adapters(adapters, label_task_of_adapter, TASK_TYPES, "they predict labels instead of generating text")


def skip_adapters(
    folders: dict[str, Path], task_of: Callable[[Path], str | None], skipped: Collection[str], why: str
) -> dict[str, Path]:
    """Returns the adapters whose task is not in `skipped`; a note names the others."""
    tasks = {name: task for name, path in folders.items() if (task := task_of(path)) in skipped}
    if tasks:
        note(f"skipped adapters, because {why}: {', '.join(f'{name} ({task})' for name, task in tasks.items())}")
    return {name: path for name, path in folders.items() if name not in tasks}


Url = Annotated[str, Parameter(help="address of an OpenAI-compatible server, such as http://127.0.0.1:8000")]


def playground(
    *,
    url: Url,
    port: Annotated[Port, Parameter(help="port of the page, which is only reachable from this machine")] = 8080,
) -> int:
    """Compare two models on a server side by side in the browser.

    The page sends the same prompt with the same seed to two adapters, or to an adapter and its base model. It shows
    both answers and how their log-probabilities differ, and it counts blind votes and saves them as preference data.
    `tailora serve` has this page built in, at the address of the server.
    """
    require_packages("fastapi", "uvicorn", "httpx", extra="serve")
    import uvicorn

    from tailora.serve.playground import playground_app

    app = playground_app(url)
    listener = listen("127.0.0.1", port)
    log(f"listening at {address('127.0.0.1', listener)} (open it in a browser); press Ctrl-C to stop")
    with suppress(KeyboardInterrupt):  # as in `serve`
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    return 0
