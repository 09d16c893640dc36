"""The same file read by transformers, and what is written read back by transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tailora.data.gguf_llama import convert

HIDDEN, HEADS, KV_HEADS, LAYERS, MIDDLE = 64, 4, 2, 2, 96
QUANTISED = GGMLQuantizationType.Q4_1
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SENTENCE = "the cat and the dog and the fish sat on the mat"


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens by id, and merges, of a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def weights(size: int, *, tied: bool) -> dict[str, tuple[int, ...]]:
    grouped = HIDDEN // HEADS * KV_HEADS
    block = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (grouped, HIDDEN),
        "attn_v": (grouped, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (MIDDLE, HIDDEN),
        "ffn_up": (MIDDLE, HIDDEN),
        "ffn_down": (HIDDEN, MIDDLE),
    }
    blocks = {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    head = {} if tied else {"output": (size, HIDDEN)}
    return {"token_embd": (size, HIDDEN), **blocks, "output_norm": (HIDDEN,), **head}


def write_gguf(path: Path, *, tied: bool) -> None:
    tokens, merges = vocabulary()
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    generator = np.random.default_rng(0)
    for name, shape in weights(len(tokens), tied=tied).items():
        values = generator.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 2:
            writer.add_tensor(f"{name}.weight", quantize(values, QUANTISED), raw_dtype=QUANTISED)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_holds_what_transformers_reads_from_the_file(tmp_path: Path, tied: bool) -> None:
    source, folder = tmp_path / "gguf" / "tiny.gguf", tmp_path / "folder"
    source.parent.mkdir()
    folder.mkdir()
    write_gguf(source, tied=tied)
    convert(source, folder)

    expected = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    found, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values()), problems
    assert found.dtype == torch.bfloat16
    assert found.config.tie_word_embeddings == tied
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.to(torch.bfloat16)), name
    expected.load_state_dict(found.state_dict())  # rounded as ours; what is left are the settings
    ids = torch.arange(20)[None]  # (1, 20)
    assert torch.equal(found.float()(ids).logits, expected(ids).logits)


def test_tokenizer_template_and_generation_settings_come_along(tmp_path: Path) -> None:
    source, folder = tmp_path / "gguf" / "tiny.gguf", tmp_path / "folder"
    source.parent.mkdir()
    folder.mkdir()
    write_gguf(source, tied=True)
    convert(source, folder)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, _ = vocabulary()
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    ids = tokenizer.apply_chat_template([{"role": "user", "content": SENTENCE}])["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids[1:-1]) == SENTENCE
    assert len(ids) < len(SENTENCE) / 2
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id == 2
