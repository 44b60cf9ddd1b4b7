"""Train once with ms-swift, the framework of the paper, at its defaults, timed.

In: a job as JSON. Out: one JSON line (see `speed.py`). The model's own chat template writes the
rows, as for all.
"""

import contextlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

from clock import Clock
from swift import SftArguments
from swift.pipelines import SwiftSft


class Timed(SwiftSft):
    """Swift's own pipeline with a clock in it."""

    clock = Clock()

    def train(self, trainer: Any) -> Any:
        """Train as Swift does."""
        trainer.add_callback(self.clock)
        return super().train(trainer)


# Swift asks for its own name of a model in a local folder.
KINDS = {"llama": "llama", "gemma3_text": "gemma3_text"}


def give_template(folder: Path, copy: Path, job: dict[str, Any]) -> None:
    """Where the tokenizer has no chat template, point the job at a copy of the folder with the one
    that all peers are given."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is not None:
        return
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (copy / name).unlink(missing_ok=True)
    tokenizer.chat_template = job["template"]
    tokenizer.save_pretrained(copy)
    job["model"] = str(copy)


def main() -> None:
    """Train one pass over the job's rows."""
    job = json.loads(sys.argv[1])
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    file = Path(job["scratch"], "messages.jsonl")
    file.write_text(
        "".join(
            json.dumps({"messages": [*row["prompt"], *row["completion"]]}) + "\n" for row in rows
        )
    )
    config = json.loads(Path(job["model"], "config.json").read_text(encoding="utf-8"))
    give_template(Path(job["model"]), Path(job["scratch"], "model"), job)
    arguments = SftArguments(
        model=job["model"],
        model_type=KINDS[config["model_type"]],
        template="chatml",
        template_backend="jinja",
        dataset=[str(file)],
        output_dir=job["scratch"],
        num_train_epochs=1,
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=1,
        lora_rank=job["lora_r"],
        lora_alpha=int(job["lora_alpha"]),
        target_modules=["all-linear"],
        max_length=job["max_length"],
        save_strategy="no",
        eval_strategy="no",
        split_dataset_ratio=0.0,
        report_to=[],
        use_hf=True,
        device_map="cpu",
        use_cpu=True,
        **job["options"],
    )
    with contextlib.redirect_stdout(sys.stderr):
        Timed(arguments).main()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {"seconds": Timed.clock.seconds, "tokens": None, "peak_bytes": peak, "what": "swift"}
        )
    )


if __name__ == "__main__":
    main()
