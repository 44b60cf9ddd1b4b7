"""Rows that Python code holds (dicts, a data frame, a data set), stored as files that a run reads.

The files lie in the cache, named by their content, so that a run can be resumed and verified.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from fulcrum.config.base import GeneralSource
from fulcrum.core import store
from fulcrum.core.errors import DataError


def as_source(value: Any) -> Any:
    """Return a source for rows that Python holds; anything else (paths, mappings) as it is.

    Rows are a list of dicts, a pandas or polars data frame, or a `datasets.Dataset`. Raises
    DataError if they hold what JSON has no form for.
    """
    rows = _rows(value)
    if rows is None:
        return value
    if not rows:
        raise DataError("no rows are given; give at least one")
    try:
        lines = [json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in rows]
    except (TypeError, ValueError) as error:
        raise DataError(f"rows hold what is no text, number or list: {error}") from error
    content = "".join(lines).encode("utf-8", "surrogatepass")
    name = hashlib.sha256(content).hexdigest()[:32]
    file = store.cache_dir() / "rows" / f"{name}.jsonl"
    if not file.exists():
        store.write_bytes(file, content)
    return str(file)


def _rows(value: Any) -> list[Mapping[str, Any]] | None:
    """Return the rows that a value holds; None if it is no collection of rows."""
    if hasattr(value, "features") and hasattr(value, "to_list"):  # datasets.Dataset
        from fulcrum.data.readers import label_names, named_labels

        labels = label_names(value.features)
        return [named_labels(row, labels) for row in value.to_list()]
    if hasattr(value, "to_dicts"):  # polars
        return list(value.to_dicts())
    if hasattr(value, "columns") and hasattr(value, "to_dict"):  # pandas
        return list(value.to_dict("records"))
    is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    items = list(value) if is_list else []
    if items and all(isinstance(item, Mapping) and not _is_source(item) for item in items):
        return items
    return None


def _is_source(item: Mapping[str, Any]) -> bool:
    return "path" in item and item.keys() <= GeneralSource.model_fields.keys()


def _plain(value: Any) -> Any:
    """Return a value of numpy or of dates as JSON holds it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} {value!r:.40}")
