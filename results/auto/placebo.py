"""A pool with its answers permuted along one cycle through all rows: python placebo.py POOL.parquet OUT.jsonl."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

rows = pq.read_table(sys.argv[1]).to_pylist()
cycle = np.random.default_rng(0).permutation(len(rows))
for place, after in zip(cycle.tolist(), np.roll(cycle, -1).tolist(), strict=True):
    rows[place]["permuted"] = rows[after]["completion"]
Path(sys.argv[2]).write_text(
    "".join(json.dumps({"prompt": r["prompt"], "completion": r["permuted"]}) + "\n" for r in rows)
)
