"""`tailora predict`: labels with probabilities, or answers, for the rows of a file or for prompts."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from dataclasses import field as dataclass_field
from itertools import chain, islice
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from tailora.cli.chat import MEMORY_ADVICE, Images, check_accepts_images, read_images, training_systems
from tailora.cli.eval import Adapter, find_target
from tailora.cli.flags import SWITCH, Json, Overwrite, flags_of, log_columns, merge_with_run
from tailora.cli.main import STDIN, log, note, print_json, stderr, write_stdout
from tailora.cli.models import (
    Adapters,
    BaseModel,
    Device,
    Loaded,
    Quantize,
    Sampling,
    base_model_name,
    check_sources,
    labels_of,
    load_model,
    parse_adapters,
    refuse_system,
)
from tailora.data.demo import resolve_demo
from tailora.data.readers import TXT, Row, RowProblem, data_error, read_json_lines, read_rows
from tailora.errors import ConfigError, DataError
from tailora.formats.io import check_new_file, partial_file, write_lines
from tailora.train.config import TrainConfig

if TYPE_CHECKING:
    from tailora.data.chat_template import ChatTokenizer
    from tailora.data.labels import Labels
    from tailora.data.messages import Messages, Tools

Flags: Any = flags_of(TrainConfig, ["field", "system", "max_length", "dtype"])
Data = Annotated[
    str | None,
    Parameter(
        name="--data",
        help="rows to predict: JSONL, JSON, CSV, Parquet, folder, Hub id, text with a prompt per line, or - for stdin",
    ),
]
DEFAULT_SAMPLING = Sampling()
CHUNK = 1000  # rows predicted at a time

Prediction = dict[str, Any]
DIGITS = 6  # of predicted numbers; float32 has about 7


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PredictFlags:
    prompt: Annotated[
        list[str] | None, Parameter(help="prompt instead of --data; repeatable; - reads one from stdin")
    ] = None
    adapter: Adapters = None
    model: BaseModel = None
    image: Images = None
    ignore_chat_template: Annotated[bool, SWITCH, Parameter(help="continue prompts without a chat template")] = False
    output: Annotated[Path | None, Parameter(help="JSONL file for rows and predictions, instead of stdout")] = None
    limit: Annotated[PositiveInt | None, Parameter(help="predict only the first N rows")] = None
    quantize: Quantize = None
    device: Device = "auto"
    overwrite: Overwrite = False
    json: Json = False


NO_FLAGS = PredictFlags()


def predict(
    adapter: Adapter = None,
    /,
    data: Data = None,
    *,
    given: PredictFlags = NO_FLAGS,
    sampling: Sampling = DEFAULT_SAMPLING,
    flags: Flags = None,
) -> int:
    """Predict labels, or generate answers, for the rows of a file or for prompts.

    Answers to --prompt are printed as text. For --data, each line of the output is a JSON object with the columns of
    the row and these columns:

    - a language model: messages (the chat that was answered, with the system message) and answer,
    - sequence-classification: label and probabilities,
    - token-classification: tags and probabilities,
    - regression: label.

    They replace columns with the same name. With several --adapter, which replace ADAPTER, the updates of all adapters
    are added together.
    """
    if given.adapter and data is None:
        adapter, data = None, adapter
    check_arguments(adapter, data, given, flags or {})
    images = read_images(given.image)
    model, folders = what_answers(adapter, given)
    config = merge_with_run(flags, next(iter(folders.values()), None), arguments={"model": model})
    log_columns(flags, config)
    labels = labels_of(model, list(folders.values()))
    refuse_system(labels, flags)
    if labels is not None and (len(folders) > 1 or images or given.ignore_chat_template):
        what = "several adapters, --image and --ignore-chat-template"
        raise ConfigError(f"{what} are for language models, but this model is for {labels.task}")
    rows = read_all(data, given.prompt, "prompt" if labels is None else "text", given.limit)
    log("loading the model")
    quantize, dtype, device = given.quantize, config.dtype, given.device
    loaded = load_model(model, folders, quantize=quantize, dtype=dtype, device=device, labels=labels)
    if labels is not None:
        results = label_predictions(loaded, labels, rows, config)
        return write_predictions(results, len(rows), model, loaded, given)
    from tailora.train.generate import image_obstacle

    obstacle = image_obstacle(loaded.model, loaded.tokenizer)
    check_accepts_images(obstacle, images)
    system = None if given.ignore_chat_template else system_of(flags, folders or {model: Path(model)})
    options = ChatOptions(config.field, system, images, obstacle, given.ignore_chat_template)
    show = write_stdout if given.prompt and given.output is None and not given.json else None
    results = answer_predictions(loaded, rows, options, sampling, show)
    return write_predictions(results, len(rows), model, loaded, given, is_shown=show is not None)


def check_arguments(adapter: str | None, data: str | None, given: PredictFlags, flags: Mapping[str, Any]) -> None:
    """Raises ConfigError or DataError for contradictions, missing data and an output that cannot be written."""
    if given.adapter and adapter is not None:
        raise ConfigError(f"use either ADAPTER ({adapter}) or --adapter, which is repeatable")
    if given.prompt and data is not None:
        raise ConfigError(f"--prompt and --data {data} cannot be combined; use only one")
    if not given.prompt and data is None:
        raise ConfigError("nothing to predict; add a file, --prompt TEXT, or - to read stdin")
    if given.ignore_chat_template and (given.image or "system" in flags):
        flag = "--image" if given.image else "--system"
        raise ConfigError(f"{flag} needs the chat template, so it cannot be combined with --ignore-chat-template")
    check_sources(data=[] if data == STDIN else [data])
    for path in () if given.output is None else (given.output, partial_file(given.output)):
        check_new_file(path, overwrite=given.overwrite)


def what_answers(adapter: str | None, given: PredictFlags) -> tuple[str, Mapping[str, Path]]:
    """Returns the model to load, and name -> folder of its adapters. Raises ConfigError or FormatError."""
    if given.adapter:
        folders = parse_adapters(given.adapter)
        return base_model_name(given.model, list(folders.values())), folders
    target = find_target(adapter, given.model)
    return target.model, parse_adapters([target.adapter]) if target.adapter is not None else {}


def write_predictions(
    results: Iterable[Prediction],
    total: int,
    model: str,
    loaded: Loaded,
    given: PredictFlags,
    *,
    is_shown: bool = False,
) -> int:
    """Writes lines to the file or to stdout, or one JSON object. is_shown: they are already on stdout."""
    from tailora.cli.progress import counter
    from tailora.train.memory import explain_out_of_memory

    output, predictions = given.output, list[Prediction]()
    try:
        with (
            explain_out_of_memory("answering", MEMORY_ADVICE),
            counter(stderr(), "rows") if output else nullcontext(lambda *_: None) as progress,
            write_lines(output) if output else nullcontext(lambda line: write_stdout(f"{line}\n")) as write,
        ):
            for number, prediction in enumerate(results, 1):
                if output is not None or not (given.json or is_shown):
                    write(dumps(prediction, ensure_ascii=False))
                predictions += [prediction] if given.json else []
                progress(number, total)
    finally:
        if output is not None and partial_file(output).exists():
            log(f"the answers so far are in {partial_file(output)}")
    if output is not None:
        log(f"{total:,} predictions written to {output}")
    if given.json:
        print_json({"model": model, "adapters": loaded.adapters, "predictions": predictions})
    return 0


# ---- Rows


def read_all(data: str | None, prompts: Sequence[str] | None, column: str, limit: int | None) -> list[Row]:
    """Returns the rows of a source, or one for each prompt. Raises DataError with all unreadable rows, or without rows.

    column: of prompts, and of lines of text.
    """
    piped = sys.stdin.read() if STDIN in (data, *(prompts or ())) else ""
    rows: Iterable[Row | RowProblem]
    if prompts:
        texts = [piped.strip() if text == STDIN else text for text in prompts]
        rows = [Row("--prompt", number, {column: text}) for number, text in enumerate(texts, 1)]
    elif data == STDIN:
        rows = rows_of_text("stdin", piped, column)
    else:
        rows = read_rows(resolve_demo(str(data), "eval_data"), split="validation")
        if str(data).lower().endswith(TXT):
            rows = chain.from_iterable(
                rows_of_text(row.file, row.fields["text"], column) if isinstance(row, Row) else [row] for row in rows
            )
    rows = list(islice(rows, limit))
    if problems := [row for row in rows if isinstance(row, RowProblem)]:
        raise data_error(problems)
    if not rows:
        raise data_error([RowProblem(str(data), 0, "no rows to predict")])
    return [row for row in rows if isinstance(row, Row)]


def rows_of_text(file: str, text: str, column: str) -> Iterable[Row | RowProblem]:
    """Returns the rows of JSON lines, or a row for each line of any other text."""
    lines = text.splitlines()
    if text.lstrip().startswith("{"):
        return read_json_lines(Path(file), [line.encode() for line in lines])
    return [Row(file, number, {column: line}) for number, line in enumerate(lines, 1) if line.strip()]


def columns_of(row: Row) -> Any:
    """Returns the row as JSON: NaN and infinity are null, and dates of Parquet are text."""
    return loads(dumps(row.fields, default=str), parse_constant=lambda _: None)


# ---- Labels


def label_predictions(
    loaded: Loaded, labels: "Labels", rows: Sequence[Row], config: TrainConfig
) -> Iterator[Prediction]:
    """Yields the predictions of a model for labels. Raises DataError with all unreadable rows first."""
    from tailora.data.schemas import convert_row, detect_schema
    from tailora.data.tokenize import result_of
    from tailora.evaluation.classification import predict_labels

    mapping = detect_schema(rows[0].file, rows, config.field, labels.task, has_labels=False)
    samples = [result_of(convert_row, row, mapping) for row in rows]
    if problems := [row.problem(s) for row, s in zip(rows, samples, strict=True) if isinstance(s, DataError)]:
        raise data_error(problems)
    for first in range(0, len(rows), CHUNK):
        part = slice(first, first + CHUNK)
        results = predict_labels(loaded.model, loaded.tokenizer, labels, samples[part], max_length=config.max_length)
        for row, result in zip(rows[part], results, strict=True):
            if isinstance(result, DataError):
                raise data_error([row.problem(result)])
            yield columns_of(row) | rounded(result)


def rounded(prediction: Any) -> Any:
    return loads(dumps(prediction), parse_float=lambda number: float(f"{float(number):.{DIGITS}g}"))


# ---- Answers


@dataclass(frozen=True)
class ChatOptions:
    """How rows become chats."""

    field: Mapping[str, str] = dataclass_field(default_factory=dict)  # names of columns
    system: str | None = None  # for chats without a system message
    images: Sequence[Any] = ()  # for every chat
    obstacle: str = ""  # why chats cannot contain images; "" if they can
    ignore_chat_template: bool = False


@dataclass(frozen=True)
class Question:
    asked: "Messages | str"
    tools: "Tools | None"
    columns: Prediction  # of the output


def answer_predictions(
    loaded: Loaded, rows: Sequence[Row], options: ChatOptions, sampling: Sampling, show: Callable[[str], None] | None
) -> Iterator[Prediction]:
    """Yields the answers of a language model. Raises DataError with all rows without a question first.

    show: receives each answer while it is generated, and a line break after it.
    """
    from tailora.data.chat_template import ChatTokenizer, DataSettings
    from tailora.train.generate import stream_reply

    tokenizer = ChatTokenizer.of(loaded.tokenizer, DataSettings(system=options.system))
    items = [read_question(row, options, tokenizer) for row in rows]
    if problems := [item for item in items if isinstance(item, RowProblem)]:
        raise data_error(problems)
    questions = [item for item in items if isinstance(item, Question)]
    for row, question in zip(rows, questions, strict=True):
        answer = ""
        arguments = {"tools": question.tools, **asdict(sampling)}
        for piece in stream_reply(loaded.model, loaded.tokenizer, question.asked, **arguments):
            answer += piece
            if show is not None:
                show(piece)
        if show is not None:
            show("\n")
        yield columns_of(row) | question.columns | {"answer": answer}


def read_question(row: Row, options: ChatOptions, tokenizer: "ChatTokenizer") -> Question | RowProblem:
    """Returns the chat in the columns `messages` or `prompt`, with its tools and the system message."""
    from tailora.data.chat_template import fit_to_template, with_system
    from tailora.data.messages import parsed_list, place_images, read_messages, read_tools, text_value
    from tailora.data.samples import Conversation
    from tailora.data.schemas import IMAGE_COLUMNS

    columns = {
        key: row.fields.get(options.field.get(key, key)) for key in ("messages", "prompt", "tools", *IMAGE_COLUMNS)
    }
    key = next((key for key in ("messages", "prompt") if options.field.get(key, key) in row.fields), None)
    if key is None:
        return row.problem(f"expected a column messages or prompt; columns: {', '.join(row.fields) or 'none'}")
    try:
        value = parsed_list(columns[key], key)
        is_chat = isinstance(value, list)
        messages = read_messages(value, key) if is_chat else [{"role": "user", "content": text_value(value, key)}]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or not str(messages[-1]["content"] or "").strip():
            raise DataError(f"{key} is empty")
        if name := next((name for name in IMAGE_COLUMNS if parsed_list(columns[name], name)), None):
            raise DataError(f"{name}: predict does not support images in rows; use --image for images of every row")
        if options.ignore_chat_template:
            if is_chat:
                raise DataError("messages need the chat template; remove --ignore-chat-template")
            return Question(messages[0]["content"], None, {})
        chat = with_system(Conversation(messages, tools=read_tools({"tools": columns["tools"]})), tokenizer)
        assert isinstance(chat, Conversation)
        chat = fit_to_template(replace(chat, first=len(chat.messages)), tokenizer)
        asked = chat.messages if options.obstacle else place_images(chat.messages, list(options.images))
        named = {"images": [file.name for file in options.images]} if options.images else {}
        return Question(asked, chat.tools, {"messages": chat.messages, **named})
    except DataError as error:
        return row.problem(error)


def system_of(flags: Mapping[str, Any] | None, sources: Mapping[str, Path]) -> str | None:
    """Returns the system message for all sources together. Raises FormatError."""
    systems = {*training_systems((flags or {}).get("system"), sources).values()}
    if len(systems) > 1:
        note("the adapters were trained with different system messages, so none is used; set one with --system TEXT")
        return None
    return systems.pop() or None
