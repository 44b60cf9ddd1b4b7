"""List what went into an adapter, for its model card: base model, rows, pools and libraries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fulcrum import sources, store
from fulcrum.config import Settings
from fulcrum.errors import ModelError

_NOT_STATED = "not stated"  # by the owner of a model or of data
_BUILTIN_LICENCE = "Apache-2.0"  # of the packaged pool


class Input(NamedTuple):
    """Something that went into an adapter: a row of the model card's table.

    kind: "model", "data" or "library"
    name: of libraries with the version
    sha256: hex; empty if nothing was hashed
    licence: empty for libraries, which state their own
    """

    kind: str
    name: str
    sha256: str
    licence: str


def list_inputs(folder: Path, settings: Settings) -> list[Input]:
    """Return what went into a finished run. Raise StoreError if its manifest cannot be read."""
    manifest = store.read_json(folder / store.MANIFEST)
    known = manifest["environment"]
    inputs = [Input("model", settings.model, known["weights"], _licence_of_model(settings.model))]
    for name, hashes in sorted(manifest["data"].items()):
        for sha256 in dict.fromkeys(_flatten(hashes)):
            inputs.append(Input("data", f"rows: {name}", sha256, _NOT_STATED))
    for source in settings.general:
        licence = _BUILTIN_LICENCE if source.path == "builtin" else _NOT_STATED
        inputs.append(Input("data", f"general data: {source.path}", "", licence))
    for name in ("fulcrum-llm", "torch", "transformers", "peft"):
        if name in known:
            inputs.append(Input("library", f"{name} {known[name]}", "", ""))
    return inputs


def _flatten(hashes: Any) -> list[str]:
    """Return the hashes in a manifest's entry: a text, or lists and mappings of such."""
    if isinstance(hashes, str):
        return [hashes]
    parts = hashes.values() if isinstance(hashes, Mapping) else hashes or ()
    flat = []
    for part in parts:
        flat += _flatten(part)
    return flat


def _licence_of_model(name: str) -> str:
    try:
        found = sources.locate(name)
    except ModelError:  # its files were removed since the run
        return _NOT_STATED
    return sources.BUILTIN[name].licence if found.kind == "wheel" else _NOT_STATED
