import pytest

from tailora.data.schemas import Conversation, Pair, Text
from tailora.data.tokenize import encode_sample, preview


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


@pytest.mark.parametrize("sample", [Pair("hello how are", " you today"), Text("one two")])
def test_the_pieces_joined_are_the_example(words_tokenizer, sample) -> None:
    tokenizer = words_tokenizer()
    example = encode_sample(sample, tokenizer, 200)
    pieces = preview(example, tokenizer)
    assert "".join(text for text, _ in pieces) == tokenizer.decode(example.input_ids.tolist())
    assert [flag for _, flag in pieces] == [False, True]


def test_the_space_between_two_pieces_is_kept(words_tokenizer) -> None:
    tokenizer = words_tokenizer()
    assert preview(encode_sample(Pair("hello how are", " you"), tokenizer, 200), tokenizer)[1][0].startswith(" you")
