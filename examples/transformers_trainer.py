"""Trains a tailora adapter with the Trainer of transformers.

    python examples/transformers_trainer.py --model MODEL --output-dir out [--texts FILE]

Checkpoints contain the adapter, the optimizer and the random states, but no weights of the base model.
`trainer.train(resume_from_checkpoint=True)` resumes from the last one.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from tailora import LoRAConfig, LoRAModel
from tailora.train.huggingface import adapting


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter with the Trainer of transformers.")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--texts", type=Path, default=Path(__file__), help="one text per line; default: this file")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = LoRAModel(AutoModelForCausalLM.from_pretrained(options.model), LoRAConfig(r=8))
    lines = [line for line in options.texts.read_text().splitlines() if line.strip()]
    rows = Dataset.from_list([dict(tokenizer(line, truncation=True, max_length=256)) for line in lines])
    held_out = rows.select(range(len(rows) // 10))

    trainer = adapting(Trainer)(  # a Trainer that accepts a LoRAModel
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            learning_rate=1e-3,
            save_steps=10,
            eval_strategy="steps",
            eval_steps=10,
            report_to=[],
        ),
        train_dataset=rows.select(range(len(rows) // 10, len(rows))),
        eval_dataset=held_out,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # writes the adapter as a PEFT folder
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.4f}; adapter in {options.output_dir}")


if __name__ == "__main__":
    main()
