"""Trains a tailora adapter with TRL's SFTTrainer (pip install trl).

    python examples/trl_sft.py --model MODEL --data chats.jsonl --output-dir out

Set HF_HUB_DISABLE_TELEMETRY=1 to keep TRL from reporting its use.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tailora import LoRAConfig, LoRAModel
from tailora.train.huggingface import adapting


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter with TRL's SFTTrainer.")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", required=True, help="JSONL with `messages`")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = LoRAModel(AutoModelForCausalLM.from_pretrained(options.model), LoRAConfig(r=8))
    trainer = adapting(SFTTrainer)(  # an SFTTrainer that accepts a LoRAModel, without peft_config
        model=model,
        args=SFTConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=1e-3,
            activation_checkpointing=True,
            bf16=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # writes the adapter as a PEFT folder
    print(f"loss {trainer.state.log_history[-1]['train_loss']:.4f}; adapter in {options.output_dir}")


if __name__ == "__main__":
    main()
