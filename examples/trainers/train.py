"""Train a model on conversations with the Hugging Face Trainer, in any number of processes.

    python train.py --model Qwen/Qwen3-4B --data conversations.jsonl --output_dir tuned
    torchrun --nproc-per-node 8 train.py --model ... --data ... --output_dir tuned
    accelerate launch --config_file fsdp2.yaml --num_processes 8 train.py --model ... --data ...

Every option of transformers.TrainingArguments works. Started again with the same options, it goes
on from the last checkpoint.
"""

import os
from dataclasses import dataclass

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from flexmask import TreeCollator, TreeTrainer, patch, read_conversations


@dataclass
class Files:
    """What TrainingArguments does not name."""

    model: str
    data: str
    max_tokens: int | None = None


if __name__ == "__main__":
    files, training = HfArgumentParser([Files, TrainingArguments]).parse_args_into_dataclasses()
    held = os.path.isdir(training.output_dir)
    checkpoint = get_last_checkpoint(training.output_dir) if held else None

    tokenizer = AutoTokenizer.from_pretrained(files.model)
    model = AutoModelForCausalLM.from_pretrained(files.model)
    trainer = TreeTrainer(
        model=patch(model),
        args=training,
        train_dataset=list(read_conversations(files.data)),
        data_collator=TreeCollator(tokenizer, max_tokens=files.max_tokens),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
