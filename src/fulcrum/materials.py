"""What went into an adapter, as a list of materials (CycloneDX 1.6): model, rows, pools, libraries, hashes, licences."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulcrum import sources, store
from fulcrum.config import Settings
from fulcrum.errors import ModelError

FILE = "inputs.cdx.json"
_UNKNOWN = "not stated"  # of whoever owns it: nobody told us
_OWN = "Apache-2.0"  # the packaged pool


def listing(folder: Path, settings: Settings) -> dict[str, Any]:
    """The materials of a finished run. Raises StoreError where its manifest cannot be read."""
    manifest = store.read_json(folder / store.MANIFEST)
    known, data = manifest["environment"], manifest["data"]
    parts = [_component("machine-learning-model", settings.model, known["weights"], _licence_of_model(settings.model))]
    for name, hashes in sorted(data.items()):
        for sha256 in dict.fromkeys(_flat(hashes)):
            parts.append(_component("data", f"rows: {name}", sha256, _UNKNOWN))
    parts += [
        _component("data", f"general data: {source.path}", None, _OWN if source.path == "builtin" else _UNKNOWN)
        for source in settings.general
    ]
    parts += [
        {"type": "library", "name": name, "version": known[name]}
        for name in ("fulcrum-llm", "torch", "transformers", "peft") if name in known
    ]  # fmt: skip
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": parts}


def _component(kind: str, name: str, sha256: str | None, licence: str) -> dict[str, Any]:
    found: dict[str, Any] = {"type": kind, "name": name, "licenses": [{"license": {"name": licence}}]}
    if sha256 is not None:
        found["hashes"] = [{"alg": "SHA-256", "content": sha256}]
    return found


def _flat(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value or ()
    return [found for each in inner for found in _flat(each)]


def _licence_of_model(name: str) -> str:
    try:
        found = sources.locate(name)
    except ModelError:  # its files were taken away since the run
        return _UNKNOWN
    return sources.BUILTIN[name].licence if found.kind == "wheel" else _UNKNOWN
