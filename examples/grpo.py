"""Reinforcement learning with a verifiable reward: TRL's GRPOTrainer (pip install 'tailora[examples]').

    python examples/grpo.py --output-dir out [--model MODEL]

The prompt is a digit, such as "7=", and the reward is 1 if the completion starts with that digit, else 0. Without
--model, a model with 30,000 random parameters learns the task. Set HF_HUB_DISABLE_TELEMETRY=1 to keep TRL from
reporting its use.
"""

import argparse

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from tailora import LoRAConfig, LoRAModel
from tailora.train.huggingface import adapting

DIGITS = "0123456789"


def is_copied(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    return [float(completion.strip()[:1] == prompt[0]) for prompt, completion in zip(prompts, completions, strict=True)]


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Returns a model with random weights and a vocabulary of digits, and its tokenizer."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "=", *DIGITS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,  # large enough for the frozen head to give one token most of the probability
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    return LlamaForCausalLM(config), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter with a verifiable reward.")
    parser.add_argument("--model", help="folder or Hub id; default: a tiny random model")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--max-steps", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.model:
        base_model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        base_model, tokenizer = tiny_model()
    trainer = adapting(GRPOTrainer)(  # a GRPOTrainer that accepts a LoRAModel, without peft_config
        model=LoRAModel(base_model, LoRAConfig(r=8)),
        reward_funcs=is_copied,
        args=GRPOConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=5e-3,
            per_device_train_batch_size=80,
            num_generations=8,
            max_completion_length=2,
            beta=0.01,  # the reference is the base model with the adapter off, so there is no second copy
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{digit}="} for digit in DIGITS] * 20),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # writes the adapter as a PEFT folder
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    before, after = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5  # means over 5 steps
    print(f"reward: {before:.2f} before, {after:.2f} after; adapter in {options.output_dir}")


if __name__ == "__main__":
    main()
