"""A program for a launcher's processes: what each holds of a model's layers, and what it says of a
text, as a line of JSON."""

import json
import sys

import numpy as np
from torch.distributed.tensor import DTensor

from fulcrum.config.sections import TrainSettings
from fulcrum.core.types import Tokens
from fulcrum.data import encode
from fulcrum.model import adapter, base_model, generate

settings = TrainSettings(dtype="float32", device="cpu")
loaded = base_model.load(sys.argv[1], settings)
layers = [weight for name, weight in loaded.causal.named_parameters() if ".layers." in name]
held = sum(
    (weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in layers
)
ids = loaded.tokenizer("the red one is here")["input_ids"]
text = Tokens(np.asarray(ids), np.ones(len(ids), dtype=bool))
adapter.new_adapter(loaded, settings, 0)
nats = [generate.mean_loss(loaded, [text])]
adapter.drop_adapter(loaded)
nats.append(generate.mean_loss(loaded, [text]))
form = encode.make_format(loaded.tokenizer, None)
(answer,) = generate.generate(loaded, [ids], form, max_new_tokens=6, batch_tokens=64)
line = json.dumps({"held": held, "nats": nats, "answer": answer, "facts": loaded.facts})
sys.stdout.write(f"{line}\n")  # in one piece: two processes write into one pipe
