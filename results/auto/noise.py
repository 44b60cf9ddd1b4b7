"""A pool whose answers are random letters, as many as there were: python noise.py POOL.parquet OUT.jsonl."""

import json
import string
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

rng = np.random.default_rng(0)
rows = pq.read_table(sys.argv[1]).to_pylist()
for row in rows:
    row["noise"] = "".join(rng.choice(list(string.ascii_lowercase), len(row["completion"])))
Path(sys.argv[2]).write_text(
    "".join(json.dumps({"prompt": r["prompt"], "completion": r["noise"]}) + "\n" for r in rows)
)
