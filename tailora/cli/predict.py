"""`tailora predict`: writes predictions for the rows of a file as JSONL: labels with probabilities, or answers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from tailora.cli.chat import MEMORY_ADVICE, check_answers_file, partial_answers
from tailora.cli.eval import Adapter, Flags, find_target
from tailora.cli.flags import Json, Overwrite, log_columns, merge_with_run
from tailora.cli.main import log, print_json, stderr, write_stdout
from tailora.cli.models import (
    BaseModel,
    Device,
    MaxNewTokens,
    Quantize,
    check_sources,
    labels_of,
    load_model,
    refuse_system,
)
from tailora.data.demo import resolve_demo
from tailora.data.readers import Row, RowProblem, data_error, read_rows
from tailora.errors import DataError
from tailora.train.config import TrainConfig

if TYPE_CHECKING:
    from tailora.data.chat_template import ChatTokenizer
    from tailora.data.labels import Labels
    from tailora.data.schemas import Conversation

Data = Annotated[
    str, Parameter(help="rows to predict: JSONL, JSON, CSV, Parquet, folder or Hub id; labels are ignored")
]
Output = Annotated[Path | None, Parameter(help="JSONL file to write rows and predictions to, instead of stdout")]
CHUNK = 1000  # rows predicted at a time

Prediction = dict[str, Any]
DIGITS = 6  # of predicted numbers; float32 has about 7


def predict(
    adapter: Adapter = None,
    /,
    *,
    data: Data,
    model: BaseModel = None,
    output: Output = None,
    limit: Annotated[PositiveInt | None, Parameter(help="predict only the first N rows")] = None,
    max_new_tokens: MaxNewTokens = 256,
    quantize: Quantize = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Predict labels, or generate answers, for all rows of a file.

    Each output line contains the columns of a row and the prediction: label and probabilities, tags and probabilities,
    or answer. Predictions replace columns with the same name.
    """
    check_sources(data=[data])
    if output is not None:
        check_answers_file(output, overwrite=overwrite)
    target = find_target(adapter, model)
    config = merge_with_run(flags, target.folder, arguments={"model": target.model})
    log_columns(flags, config)
    rows = read_all(resolve_demo(data, "eval_data"), limit)
    log("loading the model")
    folders = {} if target.folder is None else {"default": target.folder}
    labels = labels_of(target.model, list(folders.values()))
    refuse_system(labels, flags)
    loaded = load_model(target.model, folders, quantize=quantize, dtype=config.dtype, device=device, labels=labels)
    from tailora.cli.progress import counter
    from tailora.train.memory import explain_out_of_memory

    predictions: list[Prediction] = []
    with (
        explain_out_of_memory("answering", MEMORY_ADVICE),
        counter(stderr(), "rows") as progress,
        partial_answers(output) if output else nullcontext(lambda line: write_stdout(f"{line}\n")) as write,
    ):
        results = (
            answer_predictions(loaded.model, loaded.tokenizer, rows, config, max_new_tokens)
            if labels is None
            else label_predictions(loaded.model, loaded.tokenizer, labels, rows, config)
        )
        for number, prediction in enumerate(results, 1):
            if output is not None or not json:
                write(dumps(prediction, ensure_ascii=False))
            predictions += [prediction] if json else []
            progress(number, len(rows))
    if output is not None:
        log(f"{len(rows):,} predictions written to {output}")
    if json:
        print_json({"model": target.model, "adapter": target.adapter, "predictions": predictions})
    return 0


def read_all(source: str, limit: int | None) -> list[Row]:
    """Returns the rows. Raises DataError with all unreadable rows, or if there are none."""
    items = list(islice(read_rows(source, split="validation"), limit))
    if problems := [item for item in items if isinstance(item, RowProblem)]:
        raise data_error(problems)
    if not items:
        raise data_error([RowProblem(source, 0, "no rows to predict")])
    return [item for item in items if isinstance(item, Row)]


def columns_of(row: Row) -> Any:
    """Returns the row as JSON: NaN and infinity are null, and dates of Parquet are text."""
    return loads(dumps(row.fields, default=str), parse_constant=lambda _: None)


# ---- Labels


def label_predictions(
    model: Any, tokenizer: Any, labels: "Labels", rows: Sequence[Row], config: TrainConfig
) -> Iterator[Prediction]:
    """Yields the predictions of a model for labels. Raises DataError with all unreadable rows first."""
    from tailora.data.schemas import convert_row, detect_source_schema
    from tailora.evaluation.classification import predict_labels

    mapping = detect_source_schema(rows[0].file, rows, config.field, labels.task, has_labels=False)
    samples: list[Any] = [convert_row(row, mapping) for row in rows]
    if problems := [sample for sample in samples if isinstance(sample, RowProblem)]:
        raise data_error(problems)
    for first in range(0, len(rows), CHUNK):
        part = slice(first, first + CHUNK)
        results = predict_labels(model, tokenizer, labels, samples[part], max_length=config.max_length)
        for row, result in zip(rows[part], results, strict=True):
            if isinstance(result, DataError):
                raise data_error([row.problem(result)])
            yield columns_of(row) | rounded(result)


def rounded(prediction: Any) -> Any:
    """Returns the prediction with its numbers rounded to DIGITS."""
    return loads(dumps(prediction), parse_float=lambda number: float(f"{float(number):.{DIGITS}g}"))


# ---- Answers


def answer_predictions(
    model: Any, tokenizer: Any, rows: Sequence[Row], config: TrainConfig, max_new_tokens: int
) -> Iterator[Prediction]:
    """Yields the greedy answers of a language model. Raises DataError with all rows without a question first."""
    from tailora.data.chat_template import ChatTokenizer, DataSettings
    from tailora.evaluation.generate import stream_reply

    chat_tokenizer = ChatTokenizer.of(tokenizer, DataSettings(system=config.system))
    questions = [question(row, config.field, chat_tokenizer) for row in rows]
    if problems := [item for item in questions if isinstance(item, RowProblem)]:
        raise data_error(problems)
    for row, chat in zip(rows, questions, strict=True):
        assert not isinstance(chat, RowProblem)
        pieces = stream_reply(model, tokenizer, chat.messages, tools=chat.tools, max_new_tokens=max_new_tokens)
        yield columns_of(row) | {"messages": chat.messages, "answer": "".join(pieces)}


def question(row: Row, field: Mapping[str, str], tokenizer: "ChatTokenizer") -> "Conversation | RowProblem":
    """Returns the chat to answer, from `messages` or `prompt`, with its tools and the settings' system message."""
    from tailora.data.chat_template import fit_to_template, with_system
    from tailora.data.messages import parsed_list, read_messages, read_tools
    from tailora.data.schemas import IMAGE_COLUMNS, Conversation

    keys = {key: field.get(key, key) for key in ("messages", "prompt")}
    key = next((key for key, column in keys.items() if column in row.fields), None)
    if key is None:
        return row.problem(f"expected a column messages or prompt; columns: {', '.join(row.fields) or 'none'}")
    try:
        value = parsed_list(row.fields[keys[key]], key)
        messages = read_messages(value, key) if isinstance(value, list) else [{"role": "user", "content": value}]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or not str(messages[-1]["content"] or "").strip():
            raise DataError(f"{key} is empty")
        for name in IMAGE_COLUMNS:
            if parsed_list(row.fields.get(field.get(name, name)), name):
                raise DataError(f"{name}: predict does not support images; remove the column, or use `tailora eval`")
        tools = read_tools({"tools": row.fields.get(field.get("tools", "tools"))})
        chat = with_system(Conversation(messages, tools=tools), tokenizer)
        assert isinstance(chat, Conversation)
        return fit_to_template(replace(chat, first=len(chat.messages)), tokenizer)
    except DataError as error:
        return row.problem(error)
