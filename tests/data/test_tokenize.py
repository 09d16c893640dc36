"""Token ids, and which of them are trained."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_vision import save_image, tiny_vlm
from tokenizers import Tokenizer, models, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tailora.data import chat_template
from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.dataset import IGNORED, Example
from tailora.data.images import read_images
from tailora.data.samples import Conversation, Pair, Sample, Text
from tailora.data.tokenize import EncodedSample, encode_sample, encode_samples, preview, prompt_ids, reply_text
from tailora.errors import DataError

# ---- Encoding

CHAT = Conversation([{"role": "user", "content": "hello how"}, {"role": "assistant", "content": "fine, thanks"}])
LLAMA2 = (
    "{% for m in messages %}{{ '<s>[INST] ' + m.content + ' [/INST]' if m.role == 'user' "
    "else ' ' + m.content + ' </s>' }}{% endfor %}"
)


def learned(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.labels[example.labels != IGNORED].tolist()))


def test_labels_are_the_ids_if_trained_and_ignored_otherwise(bytes_tokenizer, chatml) -> None:
    tokenizer = bytes_tokenizer(chatml)
    example = encode_sample(CHAT, tokenizer, 100)
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    assert tokenizer.decode(example.input_ids.tolist()).endswith("assistant\nfine, thanks<|im_end|>")
    assert learned(example, tokenizer) == "fine, thanks<|im_end|>"
    assert np.array_equal(example.labels, np.where(example.labels == IGNORED, IGNORED, example.input_ids))


@pytest.mark.parametrize("sample", [CHAT, Pair("hello", " you"), Text("hello you")], ids=["chat", "pair", "text"])
def test_the_end_is_trained_though_padding_is_the_same_token(bytes_tokenizer, chatml, sample) -> None:
    tokenizer = bytes_tokenizer(chatml if isinstance(sample, Conversation) else None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = encode_sample(sample, tokenizer, 100)
    assert example.labels[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "sample"),
    [
        (LLAMA2, CHAT),  # the template writes <s>
        (None, Pair("hello", " you")),  # the tokenizer does
        (None, Text("hello you")),
        (None, Text("<s>hello you")),  # the data did, and the tokenizer would again
        (None, Pair("<s>hello", " you</s>")),
    ],
)
def test_there_is_one_bos_and_one_eos(words_tokenizer, template, sample) -> None:
    tokenizer = words_tokenizer(template)
    ids = encode_sample(sample, tokenizer, 100).input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_a_tokenizer_that_writes_its_own_eos_ends_neither_prompt_nor_text_twice(words_tokenizer) -> None:
    tokenizer = words_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=special
    )
    ids = encode_sample(Pair("hello", " you"), tokenizer, 100).input_ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "sample",
    [
        Pair("what is the wea", "ther like"),  # as one text, a token would span the border
        Pair("hello ", " you"),
        Pair("hello", " you"),
        Pair("hello\n", "\nyou"),
        Pair("", "hello"),
    ],
)
@pytest.mark.parametrize("family", ["bytes_tokenizer", "words_tokenizer"])
def test_the_prompt_is_the_tokens_that_generation_sees(request, family, sample) -> None:
    tokenizer = request.getfixturevalue(family)()
    example = encode_sample(sample, tokenizer, 100)
    prompt = prompt_ids(sample, tokenizer)
    alone = tokenizer(sample.prompt)["input_ids"]
    assert prompt == alone
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert (example.labels[: len(prompt)] == IGNORED).all()
    assert (example.labels[max(1, len(prompt)) :] != IGNORED).all()


def test_the_tokens_of_the_whole_text_are_kept_if_the_prompt_agrees(words_tokenizer) -> None:
    """Tokenised by itself, the reply would get the mark of a text's first word."""
    tokenizer = words_tokenizer(LLAMA2)
    example = encode_sample(CHAT, tokenizer, 100)
    whole = tokenizer.apply_chat_template(CHAT.messages, return_dict=False)
    assert example.input_ids.tolist() == whole
    assert example.input_ids.tolist()[: len(prompt_ids(CHAT, tokenizer))] == prompt_ids(CHAT, tokenizer)


def test_a_reply_that_would_merge_with_the_header_is_tokenized_on_its_own(bytes_tokenizer) -> None:
    template = (
        "{{ messages[0].content }} the wea{% if messages | length > 1 %}{{ messages[1].content }}<|im_end|>{% endif %}"
    )
    chat = Conversation([{"role": "user", "content": "what is"}, {"role": "assistant", "content": "ther"}])
    tokenizer = bytes_tokenizer(template)
    example = encode_sample(chat, tokenizer, 100)
    prompt = prompt_ids(chat, tokenizer)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert learned(example, tokenizer) == "ther<|im_end|>"


def test_a_tokenizer_without_offsets_works_too(chatml) -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = chatml.replace("<|im_start|>", "").replace("<|im_end|>", "</s>")
    example = encode_sample(CHAT, tokenizer, 100)
    assert learned(example, tokenizer) == "fine, thanks</s>"
    assert example.input_ids.tolist() == tokenizer.apply_chat_template(CHAT.messages, return_dict=False)


def test_a_longer_sample_is_cut_and_its_end_is_not_trained(bytes_tokenizer) -> None:
    tokenizer = bytes_tokenizer()
    whole, cut = (encode_sample(Pair("hello", " you" * 9), tokenizer, length) for length in (100, 5))
    assert len(cut.input_ids) == 5
    assert cut.input_ids.tolist() == whole.input_ids[:5].tolist()
    assert tokenizer.eos_token_id not in cut.labels
    assert encode_sample(Pair("hello how are you " * 9, "fine"), tokenizer, 5).supervised == 0


def test_a_sample_without_trained_tokens_is_refused(bytes_tokenizer) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="the row has no tokens to train on"):
        encode_sample(Text("\n"), tokenizer, 9)  # one token, which nothing predicts


@pytest.mark.parametrize(("sample", "reply"), [(CHAT, "fine, thanks"), (Pair("a", "b"), "b"), (Text("c"), "c")])
def test_the_reply_is_the_last_trained_text(bytes_tokenizer, sample: Sample, reply: str) -> None:
    assert reply_text(sample, bytes_tokenizer()) == reply


def test_the_prompt_of_a_chat_ends_where_the_reply_begins(bytes_tokenizer, chatml) -> None:
    tokenizer = bytes_tokenizer(chatml)
    asked = prompt_ids(CHAT, tokenizer)
    assert tokenizer.decode(asked) == "<|im_start|>user\nhello how<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_ids(Conversation(CHAT.messages[:1]), tokenizer) == asked
    assert prompt_ids(Pair("hello how", "fine"), tokenizer) == asked


# ---- Long texts, which are tokenised in pieces


def random_text(random: np.random.Generator, most: int) -> str:
    """Characters of a few kinds, and then two words."""
    letters = ["ab", "a", "hello how are é ", " \n", "😀x", "</s> "][random.integers(6)]
    return "".join(random.choice(list(letters), size=random.integers(1, most)).tolist()) + " what is. "


def long_text(random: np.random.Generator, parts: int = 40) -> str:
    return "".join(random_text(random, 200) for _ in range(parts))


def long_samples(kind: str) -> list[Sample]:
    random = np.random.default_rng(0)
    if kind == "text":
        texts = [long_text(random) for _ in range(8)]
        texts += ["<s>" + texts[0], ("ab" * 7 + " ") * 300, texts[1] + "</s>"]
        return list(map(Text, texts))
    if kind == "pair":
        return [Pair(long_text(random, 1 + 2 * number), long_text(random, 20)) for number in range(8)]
    roles = ["user", "assistant"] * 10
    return [
        Conversation([{"role": role, "content": long_text(random, 3)} for role in roles[: 2 * random.integers(3, 11)]])
        for _ in range(8)
    ]


def encoded(samples: list[Sample], tokenizer: Any, max_length: int) -> list[EncodedSample]:
    results = encode_samples(samples, ChatTokenizer.of(tokenizer, DataSettings(max_length=max_length)))
    assert not any(isinstance(result, DataError) for result in results)
    return [part for result in results if not isinstance(result, DataError) for part in result]


@pytest.mark.parametrize("kind", ["text", "pair", "chat"])
@pytest.mark.parametrize("family", ["bytes", "words"])
def test_pieces_give_the_tokens_of_the_whole_text(
    bytes_tokenizer, words_tokenizer, chatml, monkeypatch, kind: str, family: str
) -> None:
    make, template = (bytes_tokenizer, chatml) if family == "bytes" else (words_tokenizer, LLAMA2)
    tokenizer, samples = make(template if kind == "chat" else None), long_samples(kind)
    lengths = (1, 60, 300, sys.maxsize)
    whole = [encoded(samples, tokenizer, max_length) for max_length in lengths]
    sizes: list[int] = []
    original = ChatTokenizer._tokenize

    def counted(self: ChatTokenizer, parts: list[str]) -> Any:
        sizes.extend(map(len, parts))
        return original(self, parts)

    monkeypatch.setattr(ChatTokenizer, "_tokenize", counted)
    monkeypatch.setattr(chat_template, "PIECE", 400)
    for max_length, expected in zip(lengths, whole, strict=True):
        sizes.clear()
        parts = encoded(samples, tokenizer, max_length)
        assert max(sizes) <= 400
        for one, other in zip(expected, parts, strict=True):
            assert one.example.input_ids.tolist() == other.example.input_ids.tolist()
            assert one.example.labels.tolist() == other.example.labels.tolist()
            assert one.length == other.length


def test_a_text_of_megabytes_is_not_tokenized_at_once(bytes_tokenizer, chatml, monkeypatch) -> None:
    tokenizer = ChatTokenizer.of(bytes_tokenizer(chatml), DataSettings(max_length=64))
    sizes: list[int] = []
    original = type(tokenizer.tokenizer).__call__

    def counted(self: Any, text: str | list[str], **options: Any) -> Any:
        sizes.extend(map(len, [text] if isinstance(text, str) else text))
        return original(self, text, **options)

    monkeypatch.setattr(type(tokenizer.tokenizer), "__call__", counted)
    pairs = [Pair("how are you " * 30_000, "you"), Pair("hello", "how are you " * 30_000)]
    (cut_away,), (learned,) = encode_samples(pairs, tokenizer)
    assert learned.length > 30_000
    assert cut_away.example.supervised == 0
    assert learned.example.supervised == 64 - int(np.argmax(learned.example.labels != IGNORED))
    assert max(sizes) <= chat_template.PIECE
    assert max(map(len, tokenizer.cache), default=0) <= 100


def test_a_piece_without_spaces_ends_anywhere() -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("aaa", -1.5)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    (result,) = encoded([Text("a" * 200_000)], tokenizer, 200_000)
    assert tokenizer.decode(result.example.input_ids).replace(" ", "") == "a" * 200_000
    assert 66_668 <= result.length <= 66_668 + 4 * 2  # as one text, and what three cuts may add


# ---- Preview


def test_a_chat_is_shown_in_pieces(bytes_tokenizer, chatml) -> None:
    tokenizer = bytes_tokenizer(chatml)
    contents = ["hello", "how are you", "fine", "thanks 🙂"]
    roles = ["user", "assistant"] * 2
    chat = Conversation([{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)])
    assert preview(encode_sample(chat, tokenizer, 200), tokenizer) == [
        ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False),
        ("how are you<|im_end|>", True),
        ("\n<|im_start|>user\nfine<|im_end|>\n<|im_start|>assistant\n", False),
        ("thanks 🙂<|im_end|>", True),
    ]


@pytest.mark.parametrize(
    ("sample", "learned_piece"),
    [(Pair("hello how are", " you today"), " you today</s>"), (Text("one two"), " one two</s>")],
)
def test_the_pieces_joined_are_the_example(words_tokenizer, sample: Sample, learned_piece: str) -> None:
    tokenizer = words_tokenizer()
    example = encode_sample(sample, tokenizer, 200)
    pieces = preview(example, tokenizer)
    assert "".join(text for text, _ in pieces) == tokenizer.decode(example.input_ids.tolist())
    assert [flag for _, flag in pieces] == [False, True]
    assert pieces[1][0] == learned_piece


def test_text_around_an_image_may_merge_with_its_neighbours_or_be_truncated(tmp_path: Path) -> None:
    processor = tiny_vlm("gemma3")[1]
    processor.tokenizer.add_tokens(["\n\n\n"])  # of the template and the placeholders
    image = {"type": "image", "image": save_image(tmp_path / "red.png", "red")}
    messages = [{"role": "user", "content": [image]}, {"role": "assistant", "content": "red"}]
    whole = encode_sample(Conversation(read_images(messages, tmp_path)), processor, 1000)
    pieces = [text for text, _ in preview(whole, processor)]
    assert pieces[:2] == ["<|im_start|>user\n\n\n<start_of_image>", "[image 28x28]"]
    assert pieces[2].startswith("<end_of_image>")
    last = np.flatnonzero(np.isin(whole.input_ids, processor.image_token_ids))[-1]
    assert preview(whole.beginning(last + 1), processor)[-1] == ("[image 28x28]", False)
