"""Samples: what rows become before they are tokenized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tailora.data.messages import Messages, Tools, text_of


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages. Assistant messages are trained."""

    messages: Messages
    first: int = 0  # index of the message where the completion begins; the prompt before it is not trained
    untrained: frozenset[int] = frozenset()  # indices of messages that the row marks as not trained
    tools: Tools | None = None

    @property
    def system(self) -> str | None:
        """The system message at the beginning, if any."""
        first = self.messages[0]
        return text_of(first) if first["role"] in ("system", "developer") else None

    @property
    def replies(self) -> list[int]:
        """The indices of all assistant messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def trained_replies(self) -> list[int]:
        return [index for index in self.replies if index >= self.first and index not in self.untrained]


@dataclass(frozen=True, slots=True)
class Pair:
    """The completion is trained. With a chat template it is one user turn and its reply."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """All of it is trained."""

    text: str


Sample: TypeAlias = Conversation | Pair | Text


@dataclass(frozen=True, slots=True)
class Choices:
    """A question with several replies. Only the correct one, at index `answer`, is trained."""

    options: tuple[Conversation | Pair, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Preference:
    """Two replies to the same prompt, one preferred over the other. Both are trained."""

    chosen: Conversation | Pair
    rejected: Conversation | Pair


@dataclass(frozen=True, slots=True)
class Feedback:
    """A reply, and whether it is desirable."""

    reply: Conversation | Pair
    desirable: bool


LabelValue: TypeAlias = str | int | float | bool | list[Any]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, two texts or a conversation, and its label or labels; None for prediction."""

    text: str = ""
    second: str | None = None
    messages: Messages | None = None
    label: LabelValue | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, and a tag for each; None for prediction."""

    tokens: list[str]
    tags: list[str | int] | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for reinforcement learning. Prompts with the same chat are equal."""

    chat: Conversation | Pair  # with an empty reply
    value: str | Messages = field(compare=False)  # what reward functions get, as in the row
    columns: Mapping[str, Any] = field(compare=False)  # the others of the row
    ids: Sequence[int] = field(default=(), compare=False)  # of the chat up to the reply, once it is encoded


AnySample: TypeAlias = Sample | Choices | Preference | Feedback | Labelled | Tagged | Prompt
