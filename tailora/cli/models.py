"""A model with its adapters, and how it samples, as `chat` and `generate` take them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from cyclopts.validators import Number

from tailora.errors import ConfigError, listing
from tailora.formats.run_folder import adapter_folder, recorded_settings
from tailora.train.config import Quantize as Methods

Model = Annotated[str, Parameter(name="--model", help="Hugging Face folder or Hub id, or 'demo'")]
Adapters = Annotated[
    list[str] | None,
    Parameter(name="--adapter", negative=(), metavar="NAME=FOLDER", help="folder, named or not; repeatable"),
]
MaxNewTokens = Annotated[PositiveInt, Parameter(help="longest answer, in tokens")]
Temperature = Annotated[NonNegativeFloat, Parameter(help="0: always the likeliest token")]
TopP = Annotated[float, Parameter(help="sample from this share of the probability", validator=Number(gt=0, lte=1))]
Seed = Annotated[NonNegativeInt, Parameter(help="of the sampling", validator=Number(lt=2**63))]
LORA_FILE = ".safetensors"
WAYS = f"{', '.join(get_args(Methods))} or none"
Quantize = Annotated[str | None, Parameter(help=f"how the base is stored: {WAYS}; without it, as in the adapter's run")]
SHORTER = "what helps: a shorter prompt, a smaller --max-new-tokens, a smaller --model, closing other programs"


@dataclass(frozen=True)
class Loaded:
    """`model` is a LoRAModel with every adapter active, or the base itself where no adapter was given."""

    model: Any
    tokenizer: Any
    adapters: list[str]


def load(model: str, adapters: Sequence[str], quantize: str | None = None, dtype: str = "auto") -> Loaded:
    """`quantize`: a method, "none", or None for that which the adapters were trained with.

    Raises ConfigError, FormatError, BaseMismatchError.
    """
    folders = named(adapters)
    import torch

    from tailora.model import LoRAModel
    from tailora.train.model_loading import load_base

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base(model, dtype, device, chosen_method(list(folders.values()), quantize))
    if not folders:
        return Loaded(base.to(device).eval(), tokenizer, [])
    (first, folder), *others = folders.items()
    adapted = LoRAModel.from_pretrained(base, folder, first)
    for name, folder in others:
        adapted.load_adapter(folder, name)
    adapted.set_adapter(list(folders))
    return Loaded(adapted.to(device).eval(), tokenizer, list(folders))


def chosen_method(folders: Sequence[Path], asked: str | None) -> str | None:
    """How to quantise the base: as asked, or as the runs of all these adapters did. Raises ConfigError."""
    if asked is not None:
        return None if asked == "none" else asked
    found = {str(folder): recorded_method(folder) for folder in folders}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{folder} {method or 'no quantisation'}" for folder, method in found.items())
        raise ConfigError(f"the adapters were trained on different bases: {said}; give --quantize METHOD or none")
    return next(iter(found.values()), None)


def recorded_method(folder: Path) -> str | None:
    """How the run that made an adapter stored its base."""
    method = recorded(folder, "quantize")
    return method if isinstance(method, str) else None


def recorded(folder: Path, setting: str) -> Any:
    """What the run.json beside an adapter says; None where there is none, or it says nothing."""
    return recorded_settings(folder).get(setting)


def enough_memory() -> AbstractContextManager[None]:
    """Within the block, running out of memory raises MemoryLimitError with the cause and what helps."""
    from tailora.train.memory import explained

    return explained("answering", lambda: SHORTER)


def vocabulary(model: str) -> tuple[Any, int]:
    """The tokenizer, and the rows of the model's embedding, without its weights. Raises ConfigError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from tailora.data.demo import resolve_demo
    from tailora.data.readers import check_model_exists

    source = resolve_demo(model, "model")
    check_model_exists(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {model!r} has no tokenizer and config that can be read: {error}") from error
    return tokenizer, empty.get_input_embeddings().weight.shape[0]


def named(adapters: Sequence[str]) -> dict[str, Path]:
    """Name -> folder for NAME=FOLDER or FOLDER; the folder of a run stands for the adapter in it. A file is a file."""
    pairs = [_named(text) for text in adapters]
    names = [name for name, _ in pairs]
    problems = [f"{path} is not a folder" for _, path in pairs if not (path.is_dir() or is_lora_file(path))]
    problems += [
        f"two adapters are called {name}: write NAME=FOLDER" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    if problems:
        raise ConfigError(listing([f"adapter: {problem}" for problem in problems]))
    return dict(pairs)


def is_lora_file(path: Path) -> bool:
    return path.is_file() and path.suffix == LORA_FILE


def _named(text: str) -> tuple[str, Path]:
    name, given, folder = ("", "", text) if Path(text).exists() else text.partition("=")
    if not given:
        folder = text
    path = adapter_folder(Path(folder))
    own = path.resolve().parent.name if path.name == "adapter" else path.resolve().name.removesuffix(LORA_FILE)
    return (name if given else own), path
