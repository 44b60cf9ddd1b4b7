"""Train once with Fulcrum, timed, in a process of its own.

In: a job as JSON. Out: one JSON line (see `speed.py`).
"""

import json
import sys
import time
from pathlib import Path

from fulcrum.config.sections import TrainSettings
from fulcrum.core.types import Example, Message
from fulcrum.data import encode, mix
from fulcrum.data.token_stream import Stream
from fulcrum.experiments.lifecycle import peak_memory_bytes
from fulcrum.model import base_model, generate, loss
from fulcrum.training import compile, loop


def main() -> None:
    """Train one pass over the job's rows in their order, as `fulcrum train` would, without dev
    evaluation.

    Compiling is not timed with it: a run that compiles is a long one. It is told apart.
    """
    job = json.loads(sys.argv[1])
    settings = TrainSettings(
        batch_size=job["batch"], lora_r=job["lora_r"], lora_alpha=job["lora_alpha"], evaluations=1
    )
    options = dict(job["options"])
    if options.pop("keep_activations", False):
        loss._ACTIVATION_BYTES = 2**62
    settings = settings.model_copy(update=options)
    loaded = base_model.load(job["model"], settings)
    form = encode.make_format(loaded.tokenizer, None)
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    messages = [
        tuple(Message(**message) for message in (*row["prompt"], *row["completion"]))
        for row in rows
    ]
    tokens = [encode.encode(Example(each, str(k), str(k)), form) for k, each in enumerate(messages)]
    warm_up = 0.0
    if job["kind"] == "score":
        started = time.perf_counter()
        generate.nats(loaded, tokens)
        seconds = time.perf_counter() - started
    else:
        if settings.compile == "always":
            started = time.perf_counter()
            compile.switch_on(loaded, settings, Example(messages[0], "0", "0"))
            warm_up = time.perf_counter() - started
        plan = mix.plan(len(tokens), 0, repeats=1, general_per_task=0, order="random", seed=0)
        stream = Stream(plan, tokens, [])
        recipe = loop.Recipe(settings, seed=0, repeats=1)
        _, result = loop.train(loaded, stream, recipe, dev_loss=lambda: 0.0)
        seconds = result.seconds
    counted = sum(len(each) for each in tokens)
    what = "; ".join([*loaded.facts, f"{warm_up:.0f} s to compile"][: None if warm_up else -1])
    print(
        json.dumps(
            {"seconds": seconds, "tokens": counted, "peak_bytes": peak_memory_bytes(), "what": what}
        )
    )


if __name__ == "__main__":
    main()
