"""One timed training run of ms-swift, the framework of the paper, at its defaults, in a process and an environment of its own.

In: a job as JSON. Out: one JSON line (see `speed.py`). The model's own chat template writes the rows, as for all.
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


def main() -> None:
    """Train one pass over the job's rows."""
    job = json.loads(sys.argv[1])
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    file = Path(job["scratch"], "messages.jsonl")
    file.write_text("".join(json.dumps({"messages": [*row["prompt"], *row["completion"]]}) + "\n" for row in rows))
    arguments = SftArguments(
        model=job["model"], model_type="llama", template="chatml", template_backend="jinja", dataset=[str(file)],
        output_dir=job["scratch"], num_train_epochs=1, per_device_train_batch_size=job["batch"], gradient_accumulation_steps=1,
        lora_rank=job["lora_r"], lora_alpha=int(job["lora_alpha"]), target_modules=["all-linear"], max_length=job["max_length"],
        save_strategy="no", eval_strategy="no", split_dataset_ratio=0.0, report_to=[], use_hf=True,
        device_map="cpu", use_cpu=True, **job["options"],
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        Timed(arguments).main()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": Timed.clock.seconds, "tokens": None, "peak_bytes": peak, "what": "swift"}))


if __name__ == "__main__":
    main()
