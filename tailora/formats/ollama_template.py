"""Ollama's TEMPLATE, which is one of Go's, from the chat template of a tokenizer, which is one of Jinja's.

Ollama recognises some chat templates in a GGUF file by their text. With any other it shows the model the bare prompt.
So the text around the messages is read off a rendered conversation; a template for which that does not work gets none:

    {{ if .System }}BEFORE{{ .System }}AFTER{{ else }}START{{ end }}
    {{ range .Messages }}{{ if eq .Role "user" }}USER{{ .Content }}REPLY
    {{ else if eq .Role "assistant" }}{{ .Content }}END{{ end }}{{ end }}

A BOS token at the start is left out if the tokenizer adds one, since llama.cpp does then, too. Tools are not written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

Message = dict[str, str]
SYSTEM, FIRST, ANSWER, SECOND = "systemtext", "firstquestion", "firstanswer", "secondquestion"
QUESTIONS: list[Message] = [
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": SECOND},
]
WITH_SYSTEM: list[Message] = [{"role": "system", "content": SYSTEM}, *QUESTIONS]


@dataclass(frozen=True)
class Frame:
    """The text around the messages of a conversation.

    start: of one without a system message.    before, after: around a system message; None: it is not written.
    user, reply: around a question; with `reply` the answer begins.    end: after an answer.
    """

    start: str
    before: str | None
    after: str
    user: str
    reply: str
    end: str

    def render(self, messages: Sequence[Message]) -> str:
        """Returns what Ollama makes of the template."""
        text = self.start
        for message in messages:
            if message["role"] == "system":
                text = self.start if self.before is None else self.before + message["content"] + self.after
            elif message["role"] == "user":
                text += self.user + message["content"] + self.reply
            else:
                text += message["content"] + self.end
        return text

    def to_go(self) -> str:
        start = self.start
        if self.before is not None:
            start = f"{{{{ if .System }}}}{self.before}{{{{ .System }}}}{self.after}"
            start += f"{{{{ else }}}}{self.start}{{{{ end }}}}" if self.start else "{{ end }}"
        user = f'{{{{ if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}{self.reply}'
        assistant = f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{self.end}'
        return f"{start}{{{{ range .Messages }}}}{user}{assistant}{{{{ end }}}}{{{{ end }}}}"


def ollama_template(tokenizer: Any) -> str | None:
    """Returns the text for TEMPLATE; None for a chat template that Ollama's cannot write."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" in template:  # that would write today's date for ever
        return None
    frame = _frame(tokenizer)
    if frame is None:
        return None
    systems = [[], *([WITH_SYSTEM[:1]] if frame.before is not None else [])]
    chats = [system + QUESTIONS[:length] for system in systems for length in (1, 3)]
    literals = (frame.start, frame.before or "", frame.after, frame.user, frame.reply, frame.end)
    if any("{{" in text or '"""' in text for text in literals):
        return None
    return frame.to_go() if all(_render(tokenizer, chat) == frame.render(chat) for chat in chats) else None


def _frame(tokenizer: Any) -> Frame | None:
    parts = _split(_render(tokenizer, QUESTIONS), [FIRST, ANSWER, SECOND])
    answered = _split(_render(tokenizer, QUESTIONS[:2], ends_with_answer=True), [FIRST, ANSWER])
    if parts is None or answered is None or not parts[2].startswith(answered[2]):
        return None
    start, reply, between, _ = parts
    end = answered[2]
    user = between.removeprefix(end)
    with_system = _split(_render(tokenizer, WITH_SYSTEM), [SYSTEM, FIRST, ANSWER, SECOND])
    before, after = (None, user) if with_system is None else with_system[:2]
    if not (start.endswith(user) and after.endswith(user)):
        return None
    return Frame(start.removesuffix(user), before, after.removesuffix(user), user, reply, end)


def _render(tokenizer: Any, messages: list[Message], *, ends_with_answer: bool = False) -> str | None:
    """Returns the conversation up to the next answer, without a BOS that llama.cpp adds; None if it is refused."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not ends_with_answer)
    except TemplateError:
        return None
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(text).removeprefix(tokenizer.bos_token if adds_bos else "")


def _split(text: str | None, contents: list[str]) -> list[str] | None:
    """Returns what is before, between and after the contents; None if they are not all there, once, in this order."""
    parts = []
    for content in contents:
        before, separator, text = (text or "").partition(content)
        if not separator or content in text:
            return None
        parts.append(before)
    return [*parts, text or ""]
