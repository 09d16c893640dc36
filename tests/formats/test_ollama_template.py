"""Ollama's template writes a conversation as the tokenizer's does, or there is none."""

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


def tokenizer_with(template: str | None, *, adds_bos: bool = False) -> Any:
    tokenizer = chat_tokenizer(["hello"], bos_token="<|endoftext|>", eos_token="<|im_end|>")
    if adds_bos:
        processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.chat_template = template
    return tokenizer


MESSAGES = (
    '{{ range .Messages }}{{ if eq .Role "user" }}%s{{ .Content }}%s{{ else if eq .Role "assistant" }}{{ .Content }}%s'
)
MESSAGES += "{{ end }}{{ end }}"
CHATML_SYSTEM = "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n%s{{ end }}"
CHATML_MESSAGES = MESSAGES % ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
HEADERS_SYSTEM = "<|start|>system<|end|>\n\n{{ .System }}<|eot|>"
HEADERS_MESSAGES = MESSAGES % ("<|start|>user<|end|>\n\n", "<|eot|><|start|>assistant<|end|>\n\n", "<|eot|>")
BOS = "<|endoftext|>"  # llama.cpp adds it, too, if the tokenizer does


@pytest.mark.parametrize(
    ("template", "adds_bos", "go"),
    [
        (CHATML, False, CHATML_SYSTEM % "" + CHATML_MESSAGES),
        (
            DEFAULT_SYSTEM,
            False,
            CHATML_SYSTEM % "{{ else }}<|im_start|>system\nYou help.<|im_end|>\n" + CHATML_MESSAGES,
        ),
        (
            HEADERS,
            False,
            f"{{{{ if .System }}}}{BOS}{HEADERS_SYSTEM}{{{{ else }}}}{BOS}{{{{ end }}}}" + HEADERS_MESSAGES,
        ),
        (HEADERS, True, f"{{{{ if .System }}}}{HEADERS_SYSTEM}{{{{ end }}}}" + HEADERS_MESSAGES),
        (NO_SYSTEM, False, BOS + MESSAGES % ("[INST] ", " [/INST]", "</s>")),
        (NO_SYSTEM, True, MESSAGES % ("[INST] ", " [/INST]", "</s>")),
    ],
    ids=["chatml", "default system", "headers", "headers, BOS", "no system", "no system, BOS"],
)
def test_the_template_in_go_has_the_text_around_the_messages(template: str, adds_bos: bool, go: str) -> None:
    assert ollama_template(tokenizer_with(template, adds_bos=adds_bos)) == go


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
