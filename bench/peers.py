"""Train once with a peer (TRL, or Hugging Face Trainer with PEFT), timed, in its own environment.

In: a job as JSON. Out: one JSON line (see `speed.py`). Time runs from the first step's beginning to
the last one's end; loading and tokenising are not counted, for anyone.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from clock import Clock
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train one pass over the job's rows."""
    job = json.loads(sys.argv[1])
    clock = Clock()
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if tokenizer.chat_template is None:
        tokenizer.chat_template = job["template"]
    lora = LoraConfig(
        r=job["lora_r"],
        lora_alpha=job["lora_alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    make = trl_trainer if job["kind"] == "trl" else hf_trainer
    trainer = make(job, rows, tokenizer, lora)
    trainer.add_callback(clock)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {"seconds": clock.seconds, "tokens": None, "peak_bytes": peak, "what": job["kind"]}
        )
    )


def trl_trainer(
    job: dict[str, Any], rows: list[dict[str, Any]], tokenizer: Any, lora: LoraConfig
) -> Any:
    """Train with SFTTrainer at its defaults, except for what the job's options say."""
    options = dict(job["options"])
    dtype = options.pop("dtype", None)
    model = job["model"]
    if dtype is not None:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, dtype))
    arguments = SFTConfig(
        output_dir=job["scratch"],
        use_cpu=True,
        num_train_epochs=1,
        save_strategy="no",
        per_device_train_batch_size=options.pop("batch", job["batch"]),
        report_to=[],
        disable_tqdm=True,
        max_length=options.pop("max_length", job["max_length"]),
        **options,
    )
    return SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )


def hf_trainer(
    job: dict[str, Any], rows: list[dict[str, Any]], tokenizer: Any, lora: LoraConfig
) -> Any:
    """Trainer with PEFT at their defaults: padded batches, labels on the answer only."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        whole = tokenizer.apply_chat_template(
            [*row["prompt"], *row["completion"]], tokenize=True, return_dict=True
        )["input_ids"]
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return {
            "input_ids": whole,
            "attention_mask": [1] * len(whole),
            "labels": [-100] * len(prompt) + whole[len(prompt) :],
        }

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(job["model"]), lora)
    arguments = TrainingArguments(
        output_dir=job["scratch"],
        use_cpu=True,
        num_train_epochs=1,
        save_strategy="no",
        per_device_train_batch_size=job["batch"],
        report_to=[],
        disable_tqdm=True,
        **job["options"],
    )
    data = Dataset.from_list([encode(row) for row in rows])
    return Trainer(
        model, args=arguments, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer)
    )


if __name__ == "__main__":
    main()
