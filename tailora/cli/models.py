"""What commands with a model and adapters share: flags, finding the adapters, loading them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from cyclopts.validators import Number

from tailora.cli.main import log, note
from tailora.data.demo import model_folder
from tailora.data.readers import check_data_exists, source_names
from tailora.errors import ConfigError, FormatError, TailoraError, listing, nearest_path
from tailora.formats.gguf_base import converted_base, folder_of
from tailora.formats.hub import DEMO, check_model_exists, find_gguf, local_folder, name_of_model
from tailora.formats.io import read_json_object
from tailora.formats.run_folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    MODEL,
    RUN,
    adapter_folder,
    recorded_metadata,
    recorded_settings,
)
from tailora.train.config import Quantize as QuantizeMethod
from tailora.train.config import TrainConfig
from tailora.train.launch import how_to_go_on, world_size

if TYPE_CHECKING:
    import torch

    from tailora.data.labels import Labels

METHODS = f"{', '.join(get_args(QuantizeMethod))} or none"
LORA_FILE = ".safetensors"
ACCEPTED = f"\nexpected the folder of a run or of an adapter, a {LORA_FILE} file, or a Hub id such as owner/name"
BASE_MODEL_KEYS = ("base_model_name_or_path", "model")  # in adapter_config.json of PEFT and of mlx-lm

# ---- Flags


Model = Annotated[
    str | None,
    Parameter(
        help="Hugging Face folder, GGUF file, Hub id, or 'demo'; default: the one named in the adapter, or 'demo'"
    ),
]
BaseModel = Annotated[
    str | None,
    Parameter(help="base model: folder, GGUF file, Hub id, or 'demo'; default: the one named in the adapter"),
]
ADAPTER_FLAG = Parameter(
    name="--adapter",
    metavar="NAME=FOLDER",
    help="adapter: folder or Hub id, optionally with a name; repeatable",
)
Adapters = Annotated[list[str] | None, ADAPTER_FLAG]
AdapterPath = Annotated[
    str, Parameter(name="adapter", help="folder of an adapter or its training run, Hub id, or LoRA file (.safetensors)")
]
Quantize = Annotated[str | None, Parameter(help=f"quantization of the base model: {METHODS}; default: as in training")]
DEVICE_HELP = TrainConfig.model_fields["device"].description
DEVICE_NAME = re.compile(r"[a-z_]+(:\d+)?")  # such as auto, cpu, cuda:1; torch knows which exist
DEVICE_PARAMETER = Parameter(name="--device", help=DEVICE_HELP)
Device = Annotated[str, DEVICE_PARAMETER]
Temperature = Annotated[NonNegativeFloat, Parameter(help="sampling temperature; 0: always the most likely token")]
TopP = Annotated[
    float,
    Parameter(
        help="sample from the most likely tokens whose probabilities add up to this value",
        validator=Number(gt=0, lte=1),
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are generated: arguments of `stream_reply`."""

    max_new_tokens: Annotated[PositiveInt, Parameter(help="maximum tokens per answer")] = 256
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Annotated[NonNegativeInt, Parameter(help="seed for sampling", validator=Number(lt=2**63))] = 0


# ---- Where adapters are, and what their runs recorded


def parse_adapters(texts: Sequence[str]) -> dict[str, Path]:
    """Returns name -> folder for each NAME=FOLDER or FOLDER. The folder of a run means its adapter.

    A repository owner/name of the Hub is downloaded once. Without NAME, an adapter is named after its run, folder or
    repository. Raises ConfigError with all problems, and FetchError.
    """
    pairs = []
    for text in texts:
        name, equals, folder = ("", "", text) if Path(text).exists() else text.partition("=")
        source = folder if equals else text
        is_misspelt = bool(nearest_path(Path(source)))  # then do not ask the Hub; the same applies to data
        path = adapter_folder(Path(source) if is_misspelt else local_folder(source))
        if not equals:
            resolved = path.resolve() if Path(source).exists() else Path(source)  # the Hub's folder is named by a hash
            name = resolved.parent.name if path.name == ADAPTER else resolved.name.removesuffix(LORA_FILE)
        pairs.append((name, path))
    names = [name for name, _ in pairs]
    problems = [
        f"{path} is not a folder{nearest_path(path)}"
        for _, path in pairs
        if not (path.is_dir() or (path.is_file() and path.suffix == LORA_FILE))
    ]
    accepted = ACCEPTED if problems else ""
    problems += [
        f"{path} contains no adapter, because its run has not finished. {how_to_go_on(path)}"
        for _, path in pairs
        if (path / RUN).is_file() and not ((path / ADAPTER_CONFIG).exists() or (path / MODEL).exists())
    ]
    problems += [
        f"two adapters are named {name}; use NAME=FOLDER" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    if problems:
        raise ConfigError(listing([f"adapter: {problem}" for problem in problems]) + accepted)
    return dict(pairs)


def find_adapter(text: str) -> Path:
    """Returns the adapter's folder or file. text: as in `parse_adapters`, without a name. Raises the same errors."""
    return next(iter(parse_adapters([f"adapter={text}"]).values()))


def quantize_method(folders: Sequence[Path], quantize: str | None) -> str | None:
    """Returns `quantize` (None for "none"), or the method used in training. Raises ConfigError if the runs differ."""
    if quantize is not None:
        return None if quantize == "none" else quantize
    methods = {str(folder): recorded_settings(folder).get("quantize") for folder in folders}
    if len(set(methods.values())) > 1:
        differences = ", ".join(f"{folder} {method or 'no quantization'}" for folder, method in methods.items())
        raise ConfigError(
            f"the adapters were trained with different quantization: {differences}; set --quantize to a method or none"
        )
    return next(iter(methods.values()), None)


@dataclass(frozen=True)
class BaseOfAdapter:
    name: str  # in the adapter
    folder: Path | None = None  # its path during training, if the name was a relative path

    def __str__(self) -> str:
        return self.name if self.folder is None else f"{self.name} ({self.folder})"

    @property
    def location(self) -> str:
        """The original folder if it still exists and the name does not lead there, otherwise the name."""
        if self.folder is None or not self.folder.is_dir():
            return self.name
        return self.name if Path(self.name).is_dir() and self.folder.samefile(self.name) else str(self.folder)


def base_of(adapter: Path) -> BaseOfAdapter | None:
    """Returns the base model that an adapter names; None if it names none or is damaged, which loading it reports."""
    try:
        settings = read_json_object(adapter / ADAPTER_CONFIG)
        name = next(settings[key] for key in BASE_MODEL_KEYS if settings.get(key))
    except (FormatError, StopIteration):
        return None
    if not isinstance(name, str):
        return None
    folder = recorded_metadata(adapter).get("base_folder")
    return BaseOfAdapter(name, Path(folder) if isinstance(folder, str) else None)


def base_model_name(model: str | None, folders: Sequence[Path]) -> str:
    """Returns the base model to load: `model`, else the one that all adapters name (with a note), else demo.

    Raises ConfigError if the adapters name none or different ones, or if the model does not exist.
    """
    if model is not None or not folders:
        check_sources(model=model)
        return model or DEMO
    bases = {folder: base_of(folder) for folder in folders}
    names = {folder: base and name_of_model(base.location) for folder, base in bases.items()}
    problems = [
        f"{folder} does not name its base model in {ADAPTER_CONFIG}; set --model"
        for folder, name in names.items()
        if name is None
    ]
    if not problems and len(set(names.values())) > 1:
        pairs = [f"{folder} was made for {name}" for folder, name in names.items()]
        problems = [f"the adapters name different base models; set --model: {listing(pairs)}"]
    if problems:
        raise ConfigError(listing(problems))
    adapter, name = next(iter(names.items()))
    note(f"the base model is {name}, as recorded in {adapter}; use --model to change it")
    try:
        if name != DEMO:
            check_model_exists(str(name))
    except ConfigError as error:
        raise ConfigError(
            f"{adapter} names the base model {bases[adapter]}; set --model to use a different one.\n{error}"
        ) from None
    return str(name)


# ---- Before anything is loaded


def check_sources(*, model: str | None = None, data: Iterable[str | None] = (), adapter: str | None = None) -> None:
    """Raises ConfigError, DataError or FetchError for all sources that do not exist. Needs no torch."""
    checks: list[tuple[Callable[[str], object], str | None]] = [(check_model_exists, model), (find_adapter, adapter)]
    checks += [(check_data_exists, source) for source in data]
    errors: list[TailoraError] = []
    for check, source in dict.fromkeys(checks):
        if source is not None and not (source == DEMO and check in (check_model_exists, check_data_exists)):
            try:
                check(source)
            except TailoraError as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(listing(list(map(str, errors))))


def check_sources_of_run(config: TrainConfig, *more_data: str | None) -> None:
    """With several processes, an error here would leave the others waiting, so the trainer checks instead."""
    if world_size() == 1:
        data = (*source_names(config.data), config.eval_data, *more_data)
        check_sources(model=config.model, data=data, adapter=config.adapter)


# ---- Loading


def fetch_sources(model: str) -> None:
    """Downloads the demo's model or converts a GGUF file, if needed and not cached. Raises FetchError."""
    if model == DEMO:
        model_folder(log)
    if (file := find_gguf(model)) is not None and not folder_of(file).is_dir():
        log(f"converting {file} to {folder_of(file)} (only the first time)")
        converted_base(file)


def device_of_flag(name: str) -> "torch.device":
    """Returns the device for --device and logs its name. Raises ConfigError."""
    from tailora.core.device import choose_device, device_name

    device = choose_device(name)
    log(f"device: {device}, {device_name(device)}")
    return device


def labels_of(model: str, folders: Sequence[Path]) -> "Labels | None":
    """Returns the labels of an adapter or of a model without adapters; None for a language model."""
    from tailora.train.model_loading import labels_of_adapter, labels_of_config, read_config

    if folders:
        return labels_of_adapter(folders[0])
    return labels_of_config(read_config(model))


def refuse_system(labels: "Labels | None", flags: Mapping[str, Any] | None) -> None:
    if labels is not None and "system" in (flags or {}):
        raise ConfigError(f"--system is for language models, but this model is for {labels.task}; remove --system")


def task_of(model: str, folders: Sequence[Path]) -> str:
    """Returns the task of an adapter, or of a model without adapters, among the tasks without labels."""
    from tailora.train.model_loading import read_config, task_of_adapter, task_of_config

    return task_of_adapter(folders[0]) if folders else task_of_config(read_config(model))


def command_to_use(model: str, adapter: str | None, labels: "Labels | None") -> list[str]:
    """Returns a command to try a model, with or without an adapter."""
    if labels is None:
        return ["tailora", "chat", "--model", model, *([] if adapter is None else ["--adapter", adapter])]
    target = ["--model", model] if adapter is None else [adapter, "--model", model]
    return ["tailora", "predict", *target, "--data", "ROWS.jsonl", "--output", "PREDICTIONS.jsonl"]


@dataclass(frozen=True)
class Loaded:
    model: Any  # a LoRAModel with all adapters active, or the base model if there are none; in evaluation mode
    tokenizer: Any
    adapters: list[str]


def load_model(
    model: str,
    folders: Mapping[str, Path],
    *,
    quantize: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    labels: "Labels | None" = None,
) -> Loaded:
    """Loads a base model and adapters (name -> folder) onto a device and logs which device it is.

    labels: `labels_of`, if the command supports models that predict labels; other commands need a language model.
    quantize: a method, "none", or None for the method used in training.
    Raises ConfigError, FormatError, BaseMismatchError.
    """
    from tailora.core.float32_products import use_fastest_products
    from tailora.model import LoRAModel
    from tailora.train.model_loading import check_writes_text, label_task_of_adapter, load_base

    fetch_sources(model)
    chosen = device_of_flag(device)
    if labels is None:
        for path in folders.values():
            check_writes_text(str(path), label_task_of_adapter(path))
        if not folders and (theirs := labels_of(model, [])) is not None:
            check_writes_text(model, theirs.task)
    task, method = task_of(model, list(folders.values())), quantize_method(list(folders.values()), quantize)
    base, tokenizer = load_base(model, dtype, chosen, method, task=task, labels=labels)
    use_fastest_products(base)
    if not folders:
        return Loaded(base.eval(), tokenizer, [])
    (first, folder), *rest = folders.items()
    adapted = LoRAModel.from_pretrained(base, folder, first)
    for name, folder in rest:
        adapted.load_adapter(folder, name)
    adapted.set_adapter(list(folders))
    return Loaded(adapted.eval(), tokenizer, list(folders))
