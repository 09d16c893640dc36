"""Prompts for reinforcement learning: rows with `messages` or `prompt`; their other columns are for the rewards."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailora.data.chat_template import ChatTokenizer
from tailora.data.dataset import (
    IGNORED,
    MOST_NAMED,
    WARNINGS,
    DataReport,
    Example,
    Examples,
    SourceReport,
    dataset_hash,
    length_histogram,
    split_examples,
)
from tailora.data.messages import Messages, as_messages, listed, parsed_list, read_tools
from tailora.data.prepare import PreparedData
from tailora.data.readers import Row, RowProblem, Source, data_error, read_rows
from tailora.data.report import sample_hash
from tailora.data.schemas import Conversation, Pair
from tailora.errors import DataError

KEYS = ("messages", "prompt")  # the first that a row has


@dataclass(frozen=True, slots=True)
class Prompt:
    """value: what reward functions get: a text or messages, as in the row.    columns: the other columns of the row.

    messages: the chat up to the reply.    ids: its tokens.
    """

    value: str | Messages
    messages: Messages
    ids: list[int]
    columns: Mapping[str, Any]
    location: str

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.value, str)

    @property
    def hash(self) -> bytes:
        columns = json.dumps(dict(self.columns), sort_keys=True, default=str).encode()
        return sample_hash(Conversation(self.messages)) + columns

    def sample(self, has_template: bool) -> Conversation | Pair:
        """Returns the prompt with an empty reply, which is what answers before and after training replace."""
        if not has_template:
            return Pair(str(self.value), "")
        return Conversation(
            [*self.messages, {"role": "assistant", "content": ""}], tools=read_tools(dict(self.columns))
        )

    def example(self, number: int) -> Example:
        """Returns the prompt as an example without a reply. number: its index."""
        ids = np.array(self.ids, dtype=np.int32)
        return Example(ids, np.full_like(ids, IGNORED), source_index=number)


def read_prompts(sources: Sequence[Source], tokenizer: ChatTokenizer, split: str = "train") -> list[Prompt]:
    """Returns the prompts of all sources. Raises DataError with the file, row and cause of every problem."""
    prompts, problems = list[Prompt](), list[RowProblem]()
    for source in sources:
        for item in read_rows(source.name, split=split):
            if isinstance(item, Row):
                try:
                    prompts.append(_prompt(item, tokenizer))
                except DataError as error:
                    problems.append(item.problem(error))
            else:
                problems.append(item)
    if problems:
        raise data_error(problems)
    if not prompts:
        raise DataError(f"data {', '.join(source.name for source in sources)}: expected at least one row, got none")
    return prompts


def _prompt(row: Row, tokenizer: ChatTokenizer) -> Prompt:
    renamed = {tokenizer.settings.field.get(key, key) if tokenizer.settings.field else key: key for key in KEYS}
    column = next((column for column in renamed if row.fields.get(column) is not None), None)
    if column is None:
        raise DataError(f"expected a prompt or messages, got the keys {listed(row.fields) or 'none'}")
    value = parsed_list(row.fields[column], renamed[column])
    messages = [message for message, _ in as_messages(value, column, "user")]
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{column}: expected a prompt, but it ends with a reply; put the reply into a different column")
    system = tokenizer.settings.system
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    columns = {name: content for name, content in row.fields.items() if name != column}
    if tokenizer.template is None:
        if not isinstance(value, str):
            raise DataError(f"{column}: messages need a chat template, but the tokenizer has none; use a text instead")
        ids = tokenizer.bos_ids + tokenizer.token_ids(value)
    else:
        tools = read_tools(row.fields)
        ids = tokenizer.token_ids(tokenizer.render(messages, tools=tools, add_generation_prompt=True))
    most = tokenizer.settings.max_length
    if not 0 < len(ids) <= most:
        raise DataError(f"{column} has {len(ids):,} tokens; expected 1 to {most:,}. Shorten it, or raise --max-length")
    return Prompt(value, messages, ids, columns, row.location)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPrompts:
    """train, held_out: the prompts; `prepared` has the same as examples without replies, and the report."""

    train: list[Prompt]
    held_out: list[Prompt]
    prepared: PreparedData


def prepare_prompts(sources: Sequence[Source], tokenizer: ChatTokenizer, eval_source: str | None) -> PreparedPrompts:
    """Reads all prompts, and holds out a part unless there is an `eval_source`. Raises DataError."""
    settings = tokenizer.settings
    if weighted := [str(source) for source in sources if source.weight != 1]:
        raise DataError(f"data {', '.join(weighted)}: prompts do not support weights; remove the weight")
    if unknown := sorted({*(settings.field or {})} - {*KEYS}):
        raise DataError(f"--field {', '.join(unknown)}: expected {' or '.join(KEYS)}; rewards get columns as they are")
    prompts = read_prompts(sources, tokenizer)
    if eval_source is None:
        hashes = [prompt.hash for prompt in prompts]
        train, other = split_examples(hashes, settings.validation_split, settings.seed)
        prompts, held_out = [prompts[index] for index in train], [prompts[index] for index in other]
    else:
        held_out = read_prompts([Source(eval_source)], tokenizer, "validation")
    sides = [Examples.of(prompt.example(number) for number, prompt in enumerate(side)) for side in (prompts, held_out)]
    lengths = np.concatenate([side.lengths for side in sides])
    columns = Counter(column for prompt in [*prompts, *held_out] for column in prompt.columns)
    name, known = ", ".join(map(str, sources)), {prompt.hash for prompt in prompts}
    copies = [prompt.location for prompt in held_out if prompt.hash in known]
    report = DataReport(
        source=name,
        sources=[SourceReport(name, 1.0, "prompts", len(lengths), len(prompts), len(held_out), len(prompts))],
        eval_source=eval_source,
        shape="prompts",
        task="grpo",
        mapping=dict(settings.field or {}),
        ignored=[],
        chat_template=tokenizer.template is not None,
        system=settings.system,
        messages={f"rows with {name}": columns[name] for name in sorted(columns)},
        rows=len(lengths),
        train=len(prompts),
        eval=len(held_out),
        tokens=int(lengths.sum()),
        supervised_tokens=0,
        longest=int(lengths.max()),
        split_examples=0,
        flagged=dict.fromkeys(WARNINGS, 0) | {"duplicates": len(copies)},
        rows_of={"duplicates": copies[:MOST_NAMED]},
        lengths=length_histogram(lengths),
        sha256=dataset_hash(*sides),
        labels={},
        eval_labels={},
    )
    samples = [prompt.sample(tokenizer.template is not None) for prompt in held_out]
    prepared = PreparedData(sides[0], sides[1], report, samples, {key[:8] for key in known}, [])
    return PreparedPrompts(prompts, held_out, prepared)
