"""Loads the base model and its tokenizer, in the precision that suits this machine, and quantized if asked."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file

from tailora.core.device import fast_dtype
from tailora.core.patterns import inside
from tailora.core.targets import set_missing_pooler, task_heads
from tailora.data.demo import resolve_model
from tailora.data.image_processor import Tokenizer, text_tokenizer
from tailora.data.labels import Labels
from tailora.data.prepare import check_vocabulary
from tailora.data.schemas import CAUSAL_LM, REGRESSION, SEQ2SEQ, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION
from tailora.errors import ConfigError, FormatError, listing
from tailora.formats.hub import check_model_exists
from tailora.formats.io import read_json_object
from tailora.formats.run_folder import ADAPTER_CONFIG, TOKENIZER_FILES, adapter_folder, recorded_metadata
from tailora.patches import before_loading
from tailora.quiet import quiet_transformers
from tailora.train.image_text_to_text import check_processor
from tailora.train.parallel import Sharding
from tailora.train.quantize import (
    format_of,
    loading_options,
    quantization_problems,
    stored_quantization,
)

DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "stored": "auto",  # what transformers calls it
}


def precision_of(dtype: str, device: torch.device) -> torch.dtype | str:
    """Returns the dtype of one of `DTYPES`; "auto" is the fastest on a GPU and the dtype of the files on a CPU."""
    if dtype != "auto":
        return DTYPES[dtype]
    return DTYPES["stored"] if device.type == "cpu" else fast_dtype(device)


@contextmanager
def _reading(name: str) -> Iterator[str]:
    """Yields the folder or Hub id of a model; within the block, what cannot be read raises ConfigError."""
    source = resolve_model(name)
    check_model_exists(source)
    try:
        with quiet_transformers():
            yield source
    except ConfigError:
        raise
    except ImportError as error:  # the package that a quantized model was quantized with
        raise ConfigError(f"model {name!r} needs a missing package: {error}; install it with pip") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(_unreadable(name, source, error)) from error
    except RuntimeError as error:
        if "conversion" not in str(error):  # such as out of memory
            raise
        raise ConfigError(
            f"transformers cannot convert the weights of model {name!r}. If it is quantized, its layers may have "
            "different schemes, which is not supported; use the model that it was made from"
        ) from error


def read_config(name: str) -> PretrainedConfig:
    """Returns config.json of a model. Raises ConfigError if it cannot be read."""
    with _reading(name) as source:
        return _config_of(source, name)


def _config_of(source: str, name: str) -> PretrainedConfig:
    """source: folder or Hub id of the model `name`."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except (StrictDataclassError, TypeError, AttributeError, ArithmeticError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(
            f"config.json of model {name!r} is invalid: {cause}; use the file of the original model"
        ) from error
    return config


def load_tokenizer(name: str, labels: Labels | None = None) -> Tokenizer:
    """Returns the tokenizer of a model, or the processor of one for images. labels: of a head, which reads text.

    Raises ConfigError if it cannot be read, DataError if it has more ids than the model.
    """
    with _reading(name) as source:
        config = _config_of(source, name)
        tokenizer = _read_tokenizer(name, source, config, labels)
    check_vocabulary(tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def _read_tokenizer(name: str, source: str, config: PretrainedConfig, labels: Labels | None) -> Tokenizer:
    if labels is not None or not reads_images(config):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
        return tokenizer
    if config.is_encoder_decoder:
        raise ConfigError(f"model {name!r} is an encoder-decoder that reads images, which is not supported")
    processor = _read_processor(name, source)
    check_processor(processor, name)
    return processor


def _read_processor(name: str, source: str) -> ProcessorMixin:
    try:
        processor = AutoProcessor.from_pretrained(source)
        if isinstance(processor, ProcessorMixin):
            return processor
        cause = f"AutoProcessor returned a {type(processor).__name__}"
    except (OSError, ValueError) as error:
        cause = str(error)
    optional: Any = {"_raise_exceptions_for_missing_entries": False}
    if any(cached_file(source, file, **optional) for file in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)):
        problem = f"its processor cannot be loaded: {cause}"
    else:
        problem = "its files contain no processor"
    raise ConfigError(
        f"model {name!r} reads images, but {problem}; copy {PROCESSOR_NAME} or {IMAGE_PROCESSOR_NAME} from the "
        "original model"
    )


def load_base(
    name: str,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    *,
    sharding: Sharding | None = None,
    task: str = CAUSAL_LM,
    labels: Labels | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Returns model and tokenizer of a folder, a Hub id, or 'demo'.

    dtype: float32, bfloat16, float16, "stored" (as in the files), or "auto" (see `precision_of`).
    device: where every weight goes as soon as it is read, so that host memory never holds the whole model.
    quantize: one of METHODS for the linear layers; other tensors have the dtype.
    sharding: each rank reads only its own parts. A quantized model is sharded when it is loaded, because a weight is
        quantized as a whole.
    task: decides on the class of the model.
    labels: those that the head predicts, for tasks with labels.
    seed: of a head that the files lack.
    tokenizer: the model's, if it has been loaded.

    Raises ConfigError if they cannot be read, quantized or sharded. Pickled weights are not read.
    """
    device = torch.device(device)
    precision = precision_of(dtype, device)
    with _reading(name) as source:
        config = _config_of(source, name)
        tokenizer = _read_tokenizer(name, source, config, labels) if tokenizer is None else tokenizer
        stored = format_of(config, name)
        is_plain = quantize is None and stored is None
        if sharding is not None:
            check_can_be_sharded(config, name, quantize)
        more = loading_options(config, name, quantize, precision, device)
        has_other_head = labels is not None and labels_of_config(config) not in (labels, None)
        if labels is not None:
            set_labels(config, labels, tokenizer)
            more["ignore_mismatched_sizes"] = True  # of a head for other labels; see `finish_heads`
        cls = model_class(task if labels is None else labels.task, config)
        before_weights = sharding.shard if sharding is not None and is_plain else None  # each rank reads only its parts
        with _loading(before_weights, is_stored=stored is not None, seed=None if labels is None else seed):
            model, report = cls.from_pretrained(
                source,
                config=config,
                dtype=precision,
                device_map={"": device},
                use_safetensors=True,
                output_loading_info=True,
                use_kernels=False,  # from the Hub; they replace forwards that adapters and our kernels build on
                **more,
            )
    heads = [] if labels is None else finish_heads(model, report, seed, has_other_head=has_other_head)
    check_complete(model, name, report, heads)
    if not is_plain and (problems := quantization_problems(model, report["unexpected_keys"])):
        raise ConfigError(f"model {name!r} cannot be used with this quantization: {listing(problems)}")
    if sharding is not None and not is_plain:
        sharding.shard(model)
    return model, tokenizer


@contextmanager
def _loading(before_weights: Callable[[Any], None] | None, *, is_stored: bool, seed: int | None) -> Iterator[None]:
    """The context of `from_pretrained`. seed: of a head that the files lack; None for models without one."""
    with ExitStack() as stack:
        if before_weights is not None:
            stack.enter_context(before_loading(before_weights))
        if is_stored or seed is not None:  # about scales of inputs, and the head that the files lack
            stack.enter_context(quiet_transformers(warnings=False))
        if is_stored:
            stack.enter_context(redirect_stdout(io.StringIO()))  # where gptqmodel logs
        if seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
        yield


def check_complete(model: PreTrainedModel, name: str, report: Mapping[str, Any], heads: Sequence[str]) -> None:
    """Raises ConfigError if the files lack weights, except for new heads. report: of `from_pretrained`."""
    untrained = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if missing := sorted(key for key in untrained if not any(inside(key, head) for head in heads)):
        raise ConfigError(
            f"model {name!r} lacks {len(missing)} weights of {type(model).__name__}, which would be randomly "
            f"initialized: {', '.join(missing[:3])}; use a complete {'' if heads else 'causal language '}model"
        )


# ---- Models with a head for labels

HEADS: dict[str, Any] = {
    SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    REGRESSION: AutoModelForSequenceClassification,
    TOKEN_CLASSIFICATION: AutoModelForTokenClassification,
    SEQ2SEQ: AutoModelForSeq2SeqLM,
}


def model_class(task: str, config: PretrainedConfig) -> Any:
    """Returns the class of transformers that loads a model for this task."""
    return HEADS.get(task, AutoModelForImageTextToText if _is_multimodal(config) else AutoModelForCausalLM)


def reads_images(config: PretrainedConfig) -> bool:
    """Returns whether the files contain a vision-language model."""
    return _is_multimodal(config) and hasattr(config, "vision_config")


def _is_multimodal(config: PretrainedConfig) -> bool:
    return _architecture(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def _architecture(config: PretrainedConfig) -> str:
    return next(iter(config.architectures or ()), "")


def new_model(config: PretrainedConfig, name: str, task: str, **options: Any) -> PreTrainedModel:
    """Returns a model with new weights. name: of the model, for messages. Raises ConfigError if no such head exists."""
    try:
        model: PreTrainedModel = model_class(task, config).from_config(config, **options)
    except ValueError as error:
        raise ConfigError(
            f"model {name!r} does not support this task ({error}); use a different --model or --task"
        ) from error
    except (LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"no model can be built from config.json of model {name!r} ({cause}); use the file of the original model"
        ) from error
    return model


def set_labels(config: PretrainedConfig, labels: Labels, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the labels and the padding token to the config, and the number of positions to the tokenizer."""
    config.id2label = dict(enumerate(labels.names))  # sets num_labels, too
    config.label2id = {name: index for index, name in enumerate(labels.names)}
    config.problem_type = None if labels.task == TOKEN_CLASSIFICATION else labels.problem_type
    text_config = config.get_text_config()
    if getattr(text_config, "pad_token_id", None) is None:  # decoders find the last token of a text by it
        text_config.pad_token_id = pad_id(tokenizer)
    if positions := getattr(text_config, "max_position_embeddings", None):
        # RoBERTa and its kin count positions from the number of the padding token on
        first = text_config.pad_token_id + 1 if "roberta" in text_config.model_type else 0
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions - first)


def finish_heads(model: PreTrainedModel, report: Mapping[str, Any], seed: int, *, has_other_head: bool) -> list[str]:
    """Returns the heads of a loaded model for labels.

    has_other_head: the files have a head for other labels, maybe of the same shape. It gets new weights.
    """
    set_missing_pooler(model, report["missing_keys"])
    heads = task_heads(model)
    if not has_other_head:
        return heads
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in (module for head in heads for module in model.get_submodule(head).modules()):
            for name, parameter in [*module.named_parameters(recurse=False)]:
                # a new object, because transformers marks those that it has read, and leaves them as they are
                setattr(module, name, nn.Parameter(parameter.detach(), parameter.requires_grad))
            model._init_weights(module)
    return heads


def pad_id(tokenizer: Tokenizer | None) -> int:
    tokenizer = text_tokenizer(tokenizer)
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id) if tokenizer else ()
    return next((token for token in candidates if token is not None), 0)


def task_of_config(config: PretrainedConfig) -> str:
    """Returns the task of a model's files, of those without labels."""
    is_seq2seq = (
        config.is_encoder_decoder and _architecture(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    )
    return SEQ2SEQ if is_seq2seq else CAUSAL_LM


def labels_of_config(config: PretrainedConfig) -> Labels | None:
    """Returns the labels of a model whose files have a trained head for some; None for other models."""
    tasks = {"ForSequenceClassification": SEQUENCE_CLASSIFICATION, "ForTokenClassification": TOKEN_CLASSIFICATION}
    task = next((task for ending, task in tasks.items() if _architecture(config).endswith(ending)), None)
    if task is None:
        return None
    names = [config.id2label[index] for index in range(config.num_labels)]
    return Labels.of_config(task, names, config.problem_type)


LABEL_TASKS_OF_PEFT = {"SEQ_CLS": SEQUENCE_CLASSIFICATION, "TOKEN_CLS": TOKEN_CLASSIFICATION}


def task_of_adapter(path: Path) -> str:
    """Returns the task of an adapter, of those without labels."""
    return SEQ2SEQ if _task_type(path) == "SEQ_2_SEQ_LM" else CAUSAL_LM


def _task_type(path: Path) -> str:
    """Returns what PEFT calls the task of an adapter; "" if its files do not name it."""
    try:
        return str(read_json_object(adapter_folder(path) / ADAPTER_CONFIG).get("task_type", ""))
    except FormatError:  # loading reports it
        return ""


def labels_of_adapter(path: Path) -> Labels | None:
    """Returns the labels of an adapter for a head, from its files or its run; None for other adapters."""
    recorded, task = recorded_metadata(path), LABEL_TASKS_OF_PEFT.get(_task_type(path))
    names = recorded.get("label_names")
    if task is None or not isinstance(names, list):
        return None
    return Labels.of_config(task, [str(name) for name in names], recorded.get("problem_type"))


def label_task_of_adapter(path: Path) -> str | None:
    """Returns the task of an adapter that predicts labels, also where its files do not name these; else None."""
    labels = labels_of_adapter(path)
    return LABEL_TASKS_OF_PEFT.get(_task_type(path)) if labels is None else labels.task


def check_writes_text(name: str, task: str | None) -> None:
    """Raises ConfigError for a model or an adapter whose task has labels. task: None for a language model."""
    if task is not None:
        raise ConfigError(
            f"{name} was trained for {task}: it predicts labels and cannot generate text; use it with `tailora "
            "predict` or `tailora eval`"
        )


def fitted_labels(labels: Labels, config: PretrainedConfig) -> Labels:
    """Returns the labels of the model's head if they include all labels of the data, else the data's labels."""
    own = labels_of_config(config)
    if own is None or (own.task, own.several) != (labels.task, labels.several):
        return labels
    return own if set(labels.names) <= set(own.names) or labels.task == REGRESSION else labels


def check_can_be_sharded(config: PretrainedConfig, name: str, quantize: str | None = None) -> None:
    """Raises ConfigError unless quantized weights keep their scales on the layer. quantize: None: as in the files."""
    stored = stored_quantization(config)
    if quantize == "nf4" or (quantize is None and stored.get("load_in_4bit")):
        return
    if method := quantize or stored.get("quant_method"):
        eight_bits = ", in 8 bits" if stored.get("load_in_8bit") else ""
        raise ConfigError(
            f"model {name!r} is quantized as {method}{eight_bits}, and FSDP2 would lose the scales; use a "
            "full-precision model with --quantize nf4, or remove --fsdp"
        )


def _unreadable(name: str, source: str, error: Exception) -> str:
    folder = Path(source)
    if (folder / "model" / "config.json").is_file():
        return f"model {name!r} is the folder of a run, not of a model; use {folder / 'model'}"
    if folder.is_dir():
        names = {entry.name for entry in folder.iterdir()}
        if "config.json" in names and names.isdisjoint(TOKENIZER_FILES):
            return (
                f"model {name!r} has no tokenizer; save the base model's tokenizer there with "
                f"tokenizer.save_pretrained({name!r}). Error from transformers: {error}"
            )
        return (
            f"model {name!r}: transformers cannot read this folder as a causal language model: {error}. It contains "
            f"{', '.join(sorted(names)) or 'nothing'}; expected config.json, a tokenizer and .safetensors weights"
        )
    return (
        f"model {name!r} is not a local folder and cannot be loaded from the Hub: {error}. Use a folder, a Hub id, or "
        "'demo'; set HF_TOKEN for gated models"
    )
