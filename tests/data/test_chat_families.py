"""What is trained under the chat templates of the model families, whose formats stand in chat_templates/ as Jinja.

Learned spans are in [[ ]]. They are checked twice: against the formats as they are written here, and for each family
token by token against the prompt that generation would begin with.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from brackets import with_brackets
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tailora.data.chat_template import ChatTokenizer, DataSettings, fit_to_template
from tailora.data.dataset import IGNORED
from tailora.data.loss_mask import render_sample
from tailora.data.samples import Conversation
from tailora.data.schemas import from_messages, from_prompt
from tailora.data.tokenize import encode_samples, prompt_ids, reply_text, stop_ids
from tailora.errors import DataError

TEMPLATES = Path(__file__).parent / "chat_templates"
TRL_TEMPLATES = {  # the originals of some, in TRL
    "llama3": "llama3_1",
    "qwen2_5": "qwen2_5",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "glm4_5": "glm4moe",
    "cohere": "cohere",
}


@dataclass(frozen=True)
class Family:
    """special: the special tokens; eos is one of them. added: tokens that are not special, though they look so."""

    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
DEEPSEEK = tuple(
    f"<｜{name}｜>"
    for name in (
        "begin▁of▁sentence",
        "end▁of▁sentence",
        *("tool▁calls▁begin", "tool▁call▁begin", "tool▁sep", "tool▁call▁end", "tool▁calls▁end"),
        *("tool▁outputs▁begin", "tool▁output▁begin", "tool▁output▁end", "tool▁outputs▁end"),
    )
)
FAMILIES = {
    "llama3": Family(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "qwen2_5": Family(CHATML, eos="<|im_end|>", added=TAGS[2:4]),
    "qwen3": Family(CHATML, eos="<|im_end|>", added=TAGS),
    "mistral": Family(
        (
            *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
            *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        eos="</s>",
        bos="<s>",
    ),
    "gemma3": Family(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), eos="<eos>", bos="<bos>"),
    "phi3": Family(
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), eos="<|endoftext|>", bos="<s>"
    ),
    "deepseek_v3": Family(
        DEEPSEEK, eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>", added=("<｜User｜>", "<｜Assistant｜>")
    ),
    "smollm2": Family(CHATML, eos="<|im_end|>"),
    "glm4_5": Family(
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        eos="<|endoftext|>",
        added=(*TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "granite3_3": Family(
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"), eos="<|end_of_text|>"
    ),
    "cohere": Family(
        (
            *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    "gpt_oss": Family(
        ("<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
        eos="<|return|>",
        bos="<|startoftext|>",
    ),
}
R1 = Family(DEEPSEEK, eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>")


def template_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


@pytest.fixture(scope="module")
def make_tokenizer(bytes_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Callable[..., PreTrainedTokenizerFast]:
    """The same tokenizer for each name: not to be changed."""
    return cache(tokenizer_of.__wrapped__(bytes_tokenizer))


@pytest.fixture
def tokenizer_of(bytes_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Callable[..., PreTrainedTokenizerFast]:
    def make(name: str, family: Family | None = None) -> PreTrainedTokenizerFast:
        family = family or FAMILIES[name]
        special = {"bos_token": family.bos} if family.bos else {}
        tokenizer = bytes_tokenizer(template_of(name), eos_token=family.eos, pad_token=family.eos, **special)
        tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
        return tokenizer

    return make


def row(*messages: dict[str, Any], **keys: Any) -> Conversation:
    return from_messages({"messages": list(messages), **keys})


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


# ---- Several turns


CHAT = row(system("s"), user("a"), assistant("b"), user("c"), assistant("d"))
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Reasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
FINAL = "<|channel|>final<|message|>"
SEVERAL_TURNS = {  # of families that differ in form: the text of CHAT, or a text for each of its two replies
    "llama3": (
        "<|begin_of_text|>" + HEADER.format("system") + "Cutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\ns<|eot_id|>"
        + HEADER.format("user") + "a<|eot_id|>" + HEADER.format("assistant") + "[[b<|eot_id|>]]"
        + HEADER.format("user") + "c<|eot_id|>" + HEADER.format("assistant") + "[[d<|eot_id|>]]",
    ),
    "qwen3": (  # as a last reply, b has an empty thought
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\n\n</think>\n\nb<|im_end|>]]",
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nd<|im_end|>]]",
    ),
    "mistral": (  # the system message stands before the last question until it has a reply
        "<s>[INST] s\n\na[/INST][[ b</s>]]",
        "<s>[INST] a[/INST] b</s>[INST] s\n\nc[/INST][[ d</s>]]",
    ),
    "gemma3": (
        "<bos><start_of_turn>user\ns\n\na<end_of_turn>\n<start_of_turn>model\n[[b<end_of_turn>]]\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n[[d<end_of_turn>]]",
    ),
    "phi3": (
        "<|system|>\ns<|end|>\n<|user|>\na<|end|>\n<|assistant|>\n[[b<|end|>]]\n"
        "<|user|>\nc<|end|>\n<|assistant|>\n[[d<|end|>\n<|endoftext|>]]",
    ),
    "glm4_5": (  # the next role ends a reply
        "[gMASK]<sop><|system|>\ns<|user|>\na<|assistant|>[[\n<think></think>\nb<|user|>]]\n"
        "c<|assistant|>[[\n<think></think>\nd]][[EOS]]",
    ),
    "gpt_oss": (  # generation ends with <|return|>, which the rest of a chat does not have: <|end|> is not trained
        f"{GPT_OSS}<|end|><|start|>developer<|message|># Instructions\n\ns\n\n<|end|><|start|>user<|message|>a<|end|>"
        f"<|start|>assistant[[{FINAL}b]]<|end|><|start|>user<|message|>c<|end|>"
        f"<|start|>assistant[[{FINAL}d<|return|>]]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL_TURNS)
def test_replies_of_several_turns_and_their_ends_are_trained(tokenizer_of, name: str) -> None:
    rendered = render_sample(CHAT, ChatTokenizer.of(tokenizer_of(name)))
    assert tuple(map(with_brackets, rendered)) == SEVERAL_TURNS[name]


# ---- Tools

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Returns the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return {"id": "call12345", "type": "function", "function": {"name": name, "arguments": arguments}}


RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": "18"}


def with_call(arguments: Any, **keys: Any) -> Conversation:
    messages = [user("a"), assistant(None, tool_calls=[call(arguments)]), RESULT, assistant("mild")]
    return row(*messages, **keys)


WITH_CALL = {  # the trained parts of a call and the reply to its result
    "llama3": ['{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>', "mild<|eot_id|>"],
    "qwen2_5": [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>',
        "mild<|im_end|>",
    ],
    "qwen3": [
        "<think>\n\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nmild<|im_end|>",
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}, "id": "call12345"}]</s>',
        " mild</s>",
    ],
    "deepseek_v3": [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '```json\n{"city": "Köln"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        "mild<｜end▁of▁sentence｜>",
    ],
    "glm4_5": [
        "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n"
        "</tool_call><|observation|>",
        "\n<think></think>\nmild",
    ],
    "gpt_oss": [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Köln"}<|call|>',
        f"{FINAL}mild<|return|>",
    ],
}


def trained_texts(chat: Conversation, tokenizer: Any) -> list[str]:
    rendered = render_sample(chat, ChatTokenizer.of(tokenizer))
    return [part.text[start:end] for part in rendered for start, end in part.trained_spans]


@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'], ids=["object", "text"])
@pytest.mark.parametrize("name", WITH_CALL)
def test_calls_are_trained_in_the_form_of_the_template(tokenizer_of, name: str, arguments: Any) -> None:
    tools = {} if name == "deepseek_v3" else {"tools": [TOOL]}
    chat = with_call(arguments, **tools)
    tokenizer = tokenizer_of(name)
    assert trained_texts(chat, tokenizer) == WITH_CALL[name]
    *_, rendered = render_sample(chat, ChatTokenizer.of(tokenizer))
    assert "18" in rendered.text
    assert ("Returns the weather." in rendered.text) == bool(tools)


FIVE_REPLIES = row(
    system("be brief"),
    user("one"),
    assistant(None, tool_calls=[call({"city": "Rome"})]),
    RESULT,
    assistant("two"),
    user("three"),
    assistant("four"),
    user("five"),
    assistant(None, tool_calls=[call({"city": "Bonn"})]),
    RESULT,
    assistant("six"),
    tools=[TOOL],
)
CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.mark.parametrize("name", ["gemma3", "cohere", "phi3", "smollm2", "granite3_3", "deepseek_v3"])
def test_a_template_without_tools_gets_them_as_text(tokenizer_of, name: str) -> None:
    """In generation as in training: both call fit_to_template."""
    tokenizer = tokenizer_of(name)
    chat = row(user("a"), assistant("hm", tool_calls=[call({"city": "Rome"})]), RESULT, RESULT, tools=[TOOL])
    fitted = fit_to_template(chat, ChatTokenizer.of(tokenizer))
    assert [message["role"] for message in fitted.messages] == ["system", "user", "assistant", "user"]
    assert '"description": "Returns the weather."' in fitted.messages[0]["content"]
    assert fitted.messages[2:] == [
        assistant(f"hm\n{CALL_TEXT}"),
        user("<tool_response>\n18\n</tool_response>\n<tool_response>\n18\n</tool_response>"),
    ]
    assert fitted.trained_replies == [2]
    prompt = tokenizer.decode(prompt_ids(row(*chat.messages, assistant("mild"), tools=[TOOL]), tokenizer))
    (rendered,) = render_sample(row(*chat.messages, assistant("mild"), tools=[TOOL]), ChatTokenizer.of(tokenizer))
    assert rendered.text.startswith(prompt)


def test_marks_and_prompts_keep_their_place_among_tools_as_text(tokenizer_of) -> None:
    tokenizer = tokenizer_of("smollm2")
    messages = [user("a"), assistant(None, tool_calls=[call({"city": "Rome"})], train=False), RESULT, RESULT]
    assert trained_texts(row(*messages, assistant("mild"), tools=[TOOL]), tokenizer) == ["mild<|im_end|>"]
    values = {"prompt": messages, "completion": [assistant("mild"), user("more"), assistant("five")]}
    assert trained_texts(from_prompt(values), tokenizer) == ["mild<|im_end|>", "five<|im_end|>"]


def test_tools_that_a_template_leaves_out_in_every_form_are_refused(tokenizer_of) -> None:
    tokenizer = tokenizer_of("phi3")
    tokenizer.chat_template = tokenizer.chat_template.replace("'system', ", "")
    chat = row(user("a"), assistant("b"), tools=[TOOL])
    with pytest.raises(DataError, match="does not render tool 0: use a model whose template supports tools"):
        render_sample(chat, ChatTokenizer.of(tokenizer))


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_the_content_beside_calls_is_not_dropped_either(tokenizer_of, name: str) -> None:
    messages = [user("a"), assistant("Let me see. ", tool_calls=[call({"city": "Rome"})])]
    with pytest.raises(DataError, match="drops the content next to the tool calls of message 1"):
        trained_texts(row(*messages, tools=[TOOL]), tokenizer_of(name))
    (written,) = trained_texts(row(*messages, tools=[TOOL]), tokenizer_of("qwen2_5"))
    assert written.startswith("Let me see. \n<tool_call>")


def test_two_calls_after_a_prompt_that_is_rewritten_are_refused(tokenizer_of) -> None:
    """A template may write its header before each call: then a part of the reply would be before the last one."""
    calls = [call({"city": "Rome"}), call({"city": "Bonn"})]
    with pytest.raises(DataError, match="message 2 cannot be trained"):
        trained_texts(row(system("s"), user("a"), assistant(None, tool_calls=calls)), tokenizer_of("mistral"))
    (text,) = trained_texts(row(system("s"), user("a"), assistant(None, tool_calls=calls[:1])), tokenizer_of("mistral"))
    assert text.startswith("[TOOL_CALLS]")


def test_a_second_call_that_a_template_leaves_out_is_named(tokenizer_of) -> None:
    calls = [call({"city": "Rome"}), call({"city": "Bonn"}, "time")]
    chat = row(user("a"), assistant(None, tool_calls=calls), tools=[TOOL])
    with pytest.raises(DataError, match="does not render tool call 1 of message 1"):
        render_sample(chat, ChatTokenizer.of(tokenizer_of("gpt_oss")))
    with pytest.raises(DataError, match="only supports single tool-calls at once"):
        render_sample(chat, ChatTokenizer.of(tokenizer_of("llama3")))
    (trained,) = trained_texts(chat, tokenizer_of("qwen2_5"))
    assert trained.count("<tool_call>") == 2


def test_a_template_that_writes_objects_as_python_gets_json_text(tokenizer_of) -> None:
    """Jinja would write {{ call.function.arguments }} of an object with single quotes."""
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- call.function.arguments | tojson + '}", "{{- call.function.arguments }}{{- '}"
    )
    (trained,) = trained_texts(row(user("a"), assistant(None, tool_calls=[call({"city": "Köln"})])), tokenizer)
    assert '"arguments": {"city": "Köln"}}' in trained


@pytest.mark.parametrize("is_marked", [True, False])
def test_marks_of_a_template_must_hold_the_call(tokenizer_of, is_marked: bool) -> None:
    begin, end = "{% generation %}", "{% endgeneration %}"
    calls = "{{ message.tool_calls | tojson }}"
    marked = f"{begin}{{{{ message.content }}}}{calls}{end}" if is_marked else f"{begin}.{end}{calls}"
    tokenizer = tokenizer_of("smollm2")
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        + marked
        + "{% else %}{{ message.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    chat = row(user("a"), assistant(None, tool_calls=[call({"city": "Rome"})]))
    if is_marked:
        assert '"Rome"' in trained_texts(chat, tokenizer)[0]
    else:
        with pytest.raises(DataError, match=r"does not render tool call 0 of message 1 between {% generation %}"):
            trained_texts(chat, tokenizer)


# ---- Reasoning


def thought(content: str, reasoning: str = "hm", name: str = "reasoning_content") -> dict[str, Any]:
    return assistant(content, **{name: reasoning})


WITH_THOUGHT = {
    "qwen3": "<think>\nhm\n</think>\n\nb<|im_end|>",
    "glm4_5": "\n<think>hm</think>\nb",
    "gpt_oss": f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{FINAL}b<|return|>",
}


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", WITH_THOUGHT)
def test_the_reasoning_of_the_last_reply_is_trained_under_each_of_its_names(tokenizer_of, name: str, key: str) -> None:
    assert trained_texts(row(user("a"), thought("b", name=key)), tokenizer_of(name)) == [WITH_THOUGHT[name]]


def test_a_reply_after_a_call_with_reasoning_follows_the_prompt_of_generation_in_gpt_oss(tokenizer_of) -> None:
    """In the prompt of the reply the reasoning is there, in the finished conversation it is not."""
    messages = [user("a"), assistant(None, tool_calls=[call({"city": "Rome"})], reasoning_content="hm"), RESULT]
    tokenizer = tokenizer_of("gpt_oss")
    of_call, of_reply = render_sample(row(*messages, assistant("zz"), tools=[TOOL]), ChatTokenizer.of(tokenizer))
    prompt = tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    assert of_reply.text == f"{prompt}{FINAL}zz<|return|>"
    ((start, end),) = of_call.trained_spans
    assert of_call.text[start:end].startswith("<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions")
    with pytest.raises(DataError, match=r"message 3 cannot be trained: .*drop earlier reasoning"):
        trained_texts(row(*messages, thought("zz"), tools=[TOOL]), tokenizer)
    assert len(trained_texts(row(*messages, thought("zz") | {"train": False}, tools=[TOOL]), tokenizer)) == 1


@pytest.mark.parametrize("name", ["llama3", "smollm2", "gemma3", "mistral"])
def test_reasoning_that_a_template_leaves_out_is_refused(tokenizer_of, name: str) -> None:
    with pytest.raises(DataError, match="drops the reasoning_content of message 1, so it cannot be trained"):
        render_sample(row(user("a"), thought("b")), ChatTokenizer.of(tokenizer_of(name)))


def test_replies_that_cannot_follow_their_prompt_are_refused_with_the_cause(tokenizer_of) -> None:
    with pytest.raises(DataError, match=r"message 1 cannot be trained: .*an unclosed thinking block"):
        render_sample(row(user("a"), assistant("b")), ChatTokenizer.of(tokenizer_of("deepseek_r1", R1)))


# ---- Messages that are not trained


def test_marked_messages_are_read_but_not_trained(tokenizer_of) -> None:
    tokenizer = tokenizer_of("llama3")
    for key, value in (("train", False), ("weight", 0)):
        chat = row(user("a"), assistant("b", **{key: value}), user("c"), assistant("d"))
        assert trained_texts(chat, tokenizer) == ["d<|eot_id|>"]
        (rendered,) = render_sample(chat, ChatTokenizer.of(tokenizer))
        assert "b<|eot_id|>" in rendered.text
    chat = row(user("a"), assistant("b"), user("c"), assistant("d", train=False))
    assert trained_texts(chat, tokenizer) == ["b<|eot_id|>"]


# ---- Answers

ENDS = {  # the tokens that end a reply, besides EOS
    "llama3": ["<|eot_id|>"],
    "qwen3": ["<|im_end|>"],
    "gemma3": ["<end_of_turn>"],
    "phi3": ["<|end|>"],
    "glm4_5": ["<|user|>"],
    "gpt_oss": ["<|return|>"],
}


@pytest.mark.parametrize("name", ENDS)
def test_generation_stops_at_the_tokens_that_end_a_reply_in_training(tokenizer_of, name: str) -> None:
    tokenizer = tokenizer_of(name)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    expected = {tokenizer.eos_token, *ENDS[name]}
    assert set(tokenizer.convert_ids_to_tokens(stop_ids(model, tokenizer))) == expected


@pytest.mark.parametrize("name", ["qwen2_5", "mistral"])
def test_the_expected_answer_of_a_call_is_what_the_template_writes(tokenizer_of, name: str) -> None:
    messages = with_call({"city": "Rome"}).messages
    chat, tokenizer = row(*messages[:2], tools=[TOOL]), tokenizer_of(name)
    expected = WITH_CALL[name][0].replace("Köln", "Rome")
    for token in FAMILIES[name].special:
        expected = expected.replace(token, "")
    assert reply_text(chat, tokenizer).strip() == expected.strip()
    assert reply_text(row(*messages), tokenizer) == "mild"
    *_, rendered = render_sample(row(*messages), ChatTokenizer.of(tokenizer))
    assert tokenizer.decode(prompt_ids(row(*messages), tokenizer)) in rendered.text


# ---- Token by token


LONG = row(
    user("hello how are you today?"),
    assistant("fine, thanks  "),
    user("what is the weather like\n in the north 🙂"),
    assistant("one two\n\nthree é"),
    user("system user assistant"),
    assistant("  seven"),
)
CHATS = {
    **{(name, "turns"): LONG for name in FAMILIES},
    **{(name, "tools"): FIVE_REPLIES for name in FAMILIES},
    **{(name, "calls"): with_call({"city": "Köln"}) for name in FAMILIES},
    **{
        (name, "thought"): row(LONG.messages[0], thought("six"), *LONG.messages[2:-1], thought("seven", "one two\n"))
        for name in WITH_THOUGHT
    },
}


def check_trained_tokens(name: str, sample: Conversation, tokenizer: Any) -> None:
    """Fails unless every reply is trained once, after the tokens of its prompt in generation, up to an end token."""
    chat_tokenizer = ChatTokenizer.of(tokenizer, DataSettings(max_length=10_000))
    (parts,) = encode_samples([sample], chat_tokenizer)
    if isinstance(parts, DataError):
        raise parts
    trained: list[int] = []
    for part in parts:
        chat = fit_to_template(part.sample, chat_tokenizer)
        ids, is_trained = part.example.input_ids.tolist(), part.example.labels != IGNORED
        expected = [False] * len(ids)
        for index in chat.trained_replies:
            prompt = tokenizer.apply_chat_template(
                chat.messages[:index], tools=chat.tools, add_generation_prompt=True, return_dict=False
            )
            assert ids[: len(prompt)] == prompt
            assert is_trained[len(prompt)]
            end = next((i for i in range(len(prompt), len(ids)) if not is_trained[i]), len(ids))
            expected[len(prompt) : end] = [True] * (end - len(prompt))
            reply = tokenizer.decode(ids[len(prompt) : end])
            assert chat.messages[index]["content"].strip() in reply
            if not (name == "gpt_oss" and index < chat.replies[-1] and "tool_calls" not in chat.messages[index]):
                assert ids[end - 1] in chat_tokenizer.special_ids
        assert is_trained.tolist() == expected
        trained += chat.trained_replies
    assert sorted(trained) == fit_to_template(sample, chat_tokenizer).replies


@pytest.mark.parametrize("case", CHATS, ids=" ".join)
def test_the_trained_tokens_are_those_that_generation_would_produce(tokenizer_of, case: tuple[str, str]) -> None:
    check_trained_tokens(case[0], CHATS[case], tokenizer_of(case[0]))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, Conversation]:
    """A family, and questions with a reply each, perhaps after calls and their results, or with reasoning."""
    name = draw(st.sampled_from(sorted(FAMILIES)))
    messages = [system("be brief")] if draw(st.booleans()) else []
    texts = st.sampled_from(["one", "two three", "é 🙂", "  four\n", "user", "<tool_call>"])
    thoughts = st.sampled_from([{}, {"reasoning_content": "hm"}] if name in WITH_THOUGHT else [{}])
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(texts)))
        for _ in range(draw(st.integers(0, 2))):
            messages += [assistant(None, tool_calls=[call({"city": draw(texts)})], **draw(thoughts)), RESULT]
        messages.append(assistant(draw(texts), **draw(thoughts)))
    return name, row(*messages, tools=[TOOL])


@given(case=conversations())
def test_any_conversation_is_trained_as_generated(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], case: tuple[str, Conversation]
) -> None:
    name, sample = case
    refused = [DataError] if name == "gpt_oss" else []  # a reply with reasoning after a call with reasoning
    with contextlib.suppress(*refused):
        check_trained_tokens(name, sample, make_tokenizer(name))


# ---- The formats are those of the original templates


def trl_template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_the_formats_are_those_of_the_templates_in_trl(tokenizer_of, name: str) -> None:
    ours, theirs = tokenizer_of(name), tokenizer_of(name)
    theirs.chat_template = trl_template(TRL_TEMPLATES[name])
    cases = [(CHAT.messages, None), (CHAT.messages[1:], None), (LONG.messages[:3], None)]
    if name in WITH_CALL:
        chat = with_call({"city": "Köln"})
        cases += [(chat.messages, [TOOL]), (chat.messages[:2], [TOOL]), (chat.messages[:3], [TOOL])]
    if name in WITH_THOUGHT:
        cases += [(row(*LONG.messages[:-1], thought("seven")).messages, None)]
    for messages, tools in cases:
        for prompt in (True, False):
            options = {"tools": tools, "add_generation_prompt": prompt, "tokenize": False}
            assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, **options)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "gemma3", "glm4_5", "cohere", "gpt_oss"])
def test_the_templates_that_trl_has_for_training_mark_all_replies_with_their_ends(tokenizer_of, name: str) -> None:
    """They write {% generation %}, and the thoughts of earlier turns."""
    original = {"gpt_oss": "gptoss", "glm4_5": "glm4moe"}.get(name, name)
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = trl_template(f"{original}_training")
    chats = [(CHAT, ["b", "d"])]
    if name in WITH_CALL:
        chats.append((with_call({"city": "Köln"}, tools=[TOOL]), ["Köln", "mild"]))
    for chat, words in chats:
        parts = trained_texts(chat, tokenizer)
        assert [word in part for word, part in zip(words, parts, strict=True)] == [True, True]
        assert all(part.endswith(FAMILIES[name].special) for part in parts)
