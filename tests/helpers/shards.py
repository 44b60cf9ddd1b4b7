"""Write sources of general data and read their shards."""

import json
from pathlib import Path

from fulcrum.config.base import GeneralSource
from fulcrum.core.types import Example
from fulcrum.data.pool import open_pool


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"question {k}", "completion": f"answer {k}", "kind": "abc"[k % 3]}
        for k in range(start, start + count)
    ]


def save(path: Path, content: list[dict[str, str]]) -> GeneralSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return GeneralSource(path=str(path))


def read(*sources: GeneralSource, near: float = 0.0) -> list[Example]:
    pool = open_pool(sources, seed=0, near=near)
    return [pool[k] for k in range(len(pool))]
