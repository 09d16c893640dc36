"""Ollama's template writes a conversation as the tokenizer's does, or there is none."""

import re
from typing import Any

import pytest
from tiny import CHATML, chat_tokenizer
from tokenizers.processors import TemplateProcessing

from tailora.formats.serving_targets import ollama_template

HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + "
    "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% else %}{{ raise_exception('no system') }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "default system": DEFAULT_SYSTEM, "no system": NO_SYSTEM}
CHAT = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes {{ x }}."},
    {"role": "user", "content": 'Then """ bye'},
    {"role": "assistant", "content": "Bye."},
    {"role": "user", "content": "Now"},
]


def tokenizer_with(template: str | None, *, adds_bos: bool = False) -> Any:
    tokenizer = chat_tokenizer(["hello"], bos_token="<|endoftext|>", eos_token="<|im_end|>")
    if adds_bos:
        processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.chat_template = template
    return tokenizer


def as_ollama(template: str, messages: list[dict[str, str]]) -> str:
    """What Go makes of a template that has `if`, `else`, `range`, fields and `eq` alone, as ours."""
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    pieces = re.split(r"{{ (.*?) }}", template)

    def run(index: int, scope: dict[str, str], active: bool) -> tuple[str, int]:
        """Returns the text up to the `else` or `end` of this level, and where that is."""
        text = ""
        while index < len(pieces):
            text += pieces[index] if active else ""
            action = pieces[index + 1] if index + 1 < len(pieces) else "end"
            if action.startswith(("else", "end")):
                return text, index + 1
            index += 2
            if action == "range .Messages":
                bodies = [run(index, {"Role": m["role"], "Content": m["content"]}, active) for m in messages]
                text, index = text + "".join(body for body, _ in bodies), bodies[0][1] + 1
            elif action.startswith("if "):
                is_done = False
                while action != "end":
                    holds = active and not is_done and condition(action, scope)
                    body, at = run(index, scope, holds)
                    text, is_done, action, index = text + body, is_done or holds, pieces[at], at + 1
            elif active:
                text += scope[action[1:]]
        return text, index

    def condition(action: str, scope: dict[str, str]) -> bool:
        if match := re.search(r'eq \.Role "(.*)"', action):
            return scope["Role"] == match[1]
        return action == "else" or bool(scope[action.split(".")[1]])

    return run(0, {"System": system}, True)[0]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_conversations_are_those_of_the_tokenizer(template: str, adds_bos: bool) -> None:
    tokenizer = tokenizer_with(template, adds_bos=adds_bos)
    go = ollama_template(tokenizer)
    assert go is not None
    systems = [[], *([] if template is NO_SYSTEM else [[{"role": "system", "content": "Be brief."}]])]
    for messages in (system + CHAT[:length] for system in systems for length in (1, 3, 5)):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = text.removeprefix("<|endoftext|>") if adds_bos else text  # llama.cpp adds it, too
        assert as_ollama(go, messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ strftime_now('%d') }}" + CHATML,  # the day of the export
        "{{ '{{' }}" + CHATML,  # Go would read it as an action
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",  # another text around every message
        "{% if messages | length == 1 %}First: {% endif %}" + CHATML,  # another start for one question alone
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_that_cannot_be_written_in_go_gives_none(template: str | None) -> None:
    assert ollama_template(tokenizer_with(template)) is None
