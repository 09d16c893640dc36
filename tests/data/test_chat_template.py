"""What is learned under the templates that models really have, written as text with the learned spans in [[ ]]."""

from pathlib import Path

import pytest
from brackets import with_brackets
from tiny_vision import save_image, tiny_llava

from tailora.data.chat_template import ChatTokenizer, DataSettings, with_system
from tailora.data.images import read_images
from tailora.data.loss_mask import render_sample
from tailora.data.samples import Conversation, Pair, Text
from tailora.errors import DataError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{%- generation %}{{ m.content }}<|im_end|>{% endgeneration -%}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}" + HEADER
)
# As MARKED, but only the words are marked, not what ends them.
MARKED_WORDS = MARKED.replace("<|im_end|>{% endgeneration -%}", "{% endgeneration -%}<|im_end|>")
# Llama 2: no header to prompt with, a BOS for every question, EOS after every reply.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
# Phi 3 closes the chat, not the turn, with EOS.
PHI3 = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
# Mistral 0.3 moves the system message to the last question.
LAST_SYSTEM = (
    "{% for m in messages[1:] %}{% if m.role == 'user' %}[INST] "
    "{{ messages[0].content ~ ' ' if loop.revindex <= 2 else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# No special token at all.
SECTIONS = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
# DeepSeek R1 prompts with a thought that it does not write in finished chats.
PROMPTED_THOUGHT = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML


def chat(*contents: str, system: str | None = None, first: int = 0) -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages, first)


TWO_TURNS = (
    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
    "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]"
)


@pytest.mark.parametrize(
    ("template", "sample", "expected"),
    [
        (CHATML + HEADER, chat("a", "b", "c", "d"), TWO_TURNS),
        (  # the words stand elsewhere too: no search would find the right ones
            CHATML + HEADER,
            chat("b", "b", "assistant\nb", "assistant"),
            "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
            "<|im_start|>user\nassistant\nb<|im_end|>\n<|im_start|>assistant\n[[assistant<|im_end|>]]",
        ),
        (  # what follows the last reply teaches nothing
            CHATML + HEADER,
            chat("a", "b", "c", system="s"),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]",
        ),
        (  # a template that takes no generation prompt: the model is to write the header itself
            CHATML,
            chat("a", "b"),
            "<|im_start|>user\na<|im_end|>\n[[<|im_start|>assistant\nb<|im_end|>]]",
        ),
        (MARKED, chat("a", "b", "c", "d"), TWO_TURNS),
        (MARKED_WORDS, chat("a", "b", "c", "d"), TWO_TURNS),
        (
            SECTIONS,
            chat("a", "b", "c", "d"),
            "### user:\na\n\n### assistant:\n[[b\n\n]]### user:\nc\n\n### assistant:\n[[d\n\n]][[EOS]]",
        ),
    ],
    ids=["chatml", "words that repeat", "ends with a question", "no header", "marked", "words marked", "sections"],
)
def test_replies_and_their_end_are_trained(bytes_tokenizer, template, sample, expected) -> None:
    (rendered,) = render_sample(sample, ChatTokenizer.of(bytes_tokenizer(template)))
    assert with_brackets(rendered) == expected


def test_every_reply_of_llama_2_is_trained_with_its_eos(words_tokenizer) -> None:
    (rendered,) = render_sample(chat("a", " b ", "c", "d"), ChatTokenizer.of(words_tokenizer(LLAMA2)))
    assert with_brackets(rendered) == "<s>[INST] a [/INST][[ b </s>]]<s>[INST] c [/INST][[ d </s>]]"


@pytest.mark.parametrize(
    ("eos", "learned"),
    [
        ("<|im_end|>", "b<|im_end|>"),
        ("<|endoftext|>", "b<|im_end|>\n<|endoftext|>"),
        ("<think>", "b<|im_end|>"),  # not written by the template: the first special token has to do
    ],
)
def test_the_span_ends_with_eos_or_else_with_the_first_special_token(bytes_tokenizer, eos, learned) -> None:
    (rendered,) = render_sample(chat("a", "b"), ChatTokenizer.of(bytes_tokenizer(PHI3, eos_token=eos)))
    assert with_brackets(rendered).endswith(f"assistant\n[[{learned}]]")


def test_a_reply_that_the_template_rewrites_becomes_an_example_of_its_own(words_tokenizer) -> None:
    sample = chat("a", "b", "c", "d", system="s")
    parts = render_sample(sample, ChatTokenizer.of(words_tokenizer(LAST_SYSTEM)))
    assert list(map(with_brackets, parts)) == [
        "[INST] s a[/INST][[ b</s>]]",
        "[INST] a[/INST] b</s>[INST] s c[/INST][[ d</s>]]",
    ]
    assert [part.sample for part in parts] == [
        Conversation(sample.messages[:3]),
        Conversation(sample.messages, untrained=frozenset({2})),
    ]


def test_a_reply_with_nothing_before_it_is_not_trained(bytes_tokenizer) -> None:
    opening = Conversation([{"role": "assistant", "content": "x"}, *chat("a", "b").messages])
    (rendered,) = render_sample(opening, ChatTokenizer.of(bytes_tokenizer(CHATML + HEADER)))
    assert with_brackets(rendered).endswith(
        "assistant\nx<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]"
    )


def test_a_pair_becomes_a_question_and_its_reply(bytes_tokenizer) -> None:
    (rendered,) = render_sample(Pair("add 1, 2\n\n", " 3"), ChatTokenizer.of(bytes_tokenizer(CHATML + HEADER)))
    assert with_brackets(rendered) == "<|im_start|>user\nadd 1, 2<|im_end|>\n<|im_start|>assistant\n[[3<|im_end|>]]"


@pytest.mark.parametrize("template", [None, CHATML])
def test_text_stays_as_it_is(bytes_tokenizer, template) -> None:
    assert (
        with_brackets(*render_sample(Text("a b\n"), ChatTokenizer.of(bytes_tokenizer(template)))) == "[[a b\n]][[EOS]]"
    )


@pytest.mark.parametrize(
    ("template", "sample", "message"),
    [
        (None, chat("a", "b"), "messages need a chat template, but the tokenizer has none; use the instruct version"),
        (PROMPTED_THOUGHT, chat("a", "b"), "message 1 cannot be trained: .*mark the reply with .*{% generation %}"),
        (CHATML + HEADER, Conversation([{"role": "assistant", "content": "x"}]), "no reply follows the first message"),
        (
            STRICT + "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
            chat("a", "b", system="s"),
            "System role",
        ),
        (MARKED.replace("'assistant'", "'model'"), chat("a", "b"), "marks 0 replies, but the chat has 1"),
        (STRICT, chat("a", "b", system="s"), "the chat template rejects this conversation: System role not supported"),
        ("{{ messages[0].content + 1 }}", chat("a", "b"), "the chat template rejects this conversation"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_refused_with_the_reason(bytes_tokenizer, template, sample, message) -> None:
    with pytest.raises(DataError, match=message):
        render_sample(sample, ChatTokenizer.of(bytes_tokenizer(template)))


@pytest.mark.parametrize(("template", "sample"), [(None, Pair("a", "b")), (SECTIONS, chat("a", "b"))])
def test_a_tokenizer_without_eos_is_refused_if_the_reply_has_no_end(bytes_tokenizer, template, sample) -> None:
    tokenizer = bytes_tokenizer(template)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token, so the model cannot learn to stop"):
        render_sample(sample, ChatTokenizer.of(tokenizer))


def test_several_templates_without_a_default_are_refused(bytes_tokenizer) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = {"rag": CHATML, "tools": CHATML}
    with pytest.raises(DataError, match="several chat templates and no default"):
        ChatTokenizer.of(tokenizer)


# ---- What of a sample is trained, and --system

ALL = "[[<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>{}]]"
TURN_2 = "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
REPLY_2 = ALL.format(TURN_2)[2:-2].replace("d<|im_end|>", "[[d<|im_end|>]]")
BOTH = REPLY_2.replace("b<|im_end|>", "[[b<|im_end|>]]")
ALL_2 = ALL.format(TURN_2)
AFTER_1 = ALL_2[2:].replace("assistant\nb", "assistant\n[[b")
PAIR = Pair("a", "b")
MARKED_1 = Conversation(chat("a", "b", "c", "d").messages, untrained=frozenset({1}))
TEXT_TEMPLATE = CHATML + HEADER


@pytest.mark.parametrize(
    ("template", "sample", "options", "expected"),
    [
        (TEXT_TEMPLATE, chat("a", "b", "c", "d"), {"assistant_only_loss": True}, BOTH),
        (TEXT_TEMPLATE, chat("a", "b", "c", "d"), {"assistant_only_loss": False}, ALL_2),
        (TEXT_TEMPLATE, chat("a", "b", "c", "d"), {"completion_only_loss": False}, ALL_2),
        (MARKED, chat("a", "b", "c", "d"), {"assistant_only_loss": False}, ALL_2),
        # of a prompt and completion of messages
        (TEXT_TEMPLATE, chat("a", "b", "c", "d", first=3), {"completion_only_loss": True}, REPLY_2),
        (MARKED, chat("a", "b", "c", "d", first=3), {}, REPLY_2),
        (TEXT_TEMPLATE, chat("a", "b", "c", "d", first=3), {"completion_only_loss": False}, ALL_2),
        (
            TEXT_TEMPLATE,
            chat("a", "b", "c", "d", first=3),
            {"completion_only_loss": False, "assistant_only_loss": True},
            BOTH,
        ),
        (TEXT_TEMPLATE, chat("a", "b", "c", "d", first=1), {"assistant_only_loss": False}, AFTER_1),
        # of a prompt and completion of text
        (TEXT_TEMPLATE, PAIR, {"completion_only_loss": True}, ALL.format("")[2:].replace("\nb", "\n[[b")),
        (TEXT_TEMPLATE, PAIR, {"completion_only_loss": False}, ALL.format("")),
        (TEXT_TEMPLATE, PAIR, {"assistant_only_loss": False}, ALL.format("")[2:].replace("\nb", "\n[[b")),
        (None, PAIR, {"completion_only_loss": True}, "a[[b]][[EOS]]"),
        (None, PAIR, {"completion_only_loss": False}, "[[ab]][[EOS]]"),
        # without a token at its end
        (SECTIONS, chat("a", "b"), {"assistant_only_loss": False}, "[[### user:\na\n\n### assistant:\nb\n\n]][[EOS]]"),
        (None, Text("a"), {"completion_only_loss": False, "assistant_only_loss": False}, "[[a]][[EOS]]"),
    ],
)
def test_what_is_trained_is_a_choice(bytes_tokenizer, template, sample, options, expected) -> None:
    tokenizer = ChatTokenizer.of(bytes_tokenizer(template), DataSettings(**options))
    assert with_brackets(*render_sample(sample, tokenizer)) == expected


@pytest.mark.parametrize(
    ("template", "sample", "options", "message"),
    [
        (None, PAIR, {"assistant_only_loss": True}, "the row has prompt and completion and the tokenizer has no temp"),
        (CHATML, MARKED_1, {"assistant_only_loss": False}, "message 1 is marked as not trained, which requires"),
        (
            LAST_SYSTEM,
            chat("a", "b", system="s", first=2),
            {"assistant_only_loss": False},
            "renders the prompt differently when the completion follows",
        ),
    ],
)
def test_a_choice_that_a_row_cannot_follow_is_refused(bytes_tokenizer, template, sample, options, message) -> None:
    if template == LAST_SYSTEM:
        template = template.replace("loop.revindex <= 2", "loop.last")
    with pytest.raises(DataError, match=message):
        render_sample(sample, ChatTokenizer.of(bytes_tokenizer(template), DataSettings(**options)))


def test_conversations_without_a_system_message_get_the_one_of_the_options(bytes_tokenizer) -> None:
    tokenizer = ChatTokenizer.of(bytes_tokenizer(CHATML + HEADER), DataSettings(system="be"))
    be = {"role": "system", "content": "be"}
    marked = Conversation(chat("a", "b", "c", "d").messages, first=1, untrained=frozenset({3}))
    assert with_system(marked, tokenizer) == Conversation([be, *marked.messages], first=2, untrained=frozenset({4}))
    assert with_system(chat("a", "b"), tokenizer) == Conversation([be, *chat("a", "b").messages])
    assert with_system(PAIR, tokenizer) == Conversation([be, *chat("a", "b").messages], first=2)
    developer = Conversation([{"role": "developer", "content": "d"}, *chat("a", "b").messages])
    for sample in (chat("a", "b", system="own"), developer, Text("a")):
        assert with_system(sample, tokenizer) == sample


def test_a_system_message_needs_a_chat_template(bytes_tokenizer) -> None:
    with pytest.raises(DataError, match="--system needs a chat template, but the tokenizer has none"):
        with_system(PAIR, ChatTokenizer.of(bytes_tokenizer(), DataSettings(system="be")))


def test_the_placeholders_of_few_sizes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailora.data.chat_template.MOST_SIZES", 2)
    asked: list[int] = []
    monkeypatch.setattr(
        "tailora.data.chat_template.image_placeholders", lambda _, sizes: asked.append(sizes[0][0]) or ["<image>"]
    )
    tokenizer = ChatTokenizer.of(tiny_llava()[1])
    for side in (20, 21, 20, 22, 20, 21):
        image = {"type": "image", "image": save_image(tmp_path / "red.png", "red", (side, side))}
        tokenizer.render(read_images([{"role": "user", "content": [image]}], tmp_path))
    assert asked == [20, 21, 22, 21]
