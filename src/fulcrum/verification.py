"""A certificate and what lies beside it -> what does not match: every number again from the outcomes, settings, data."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter, ValidationError

from fulcrum import certificate, inputs, outcomes, run_folder, store
from fulcrum.certificate import Question
from fulcrum.errors import StoreError


class Verification(NamedTuple):
    """What does not match, and what could not be checked, in words."""

    wrong: list[str]
    unchecked: list[str]


def of_run(folder: Path) -> Verification:
    """Compare what a finished run made with the hashes in its manifest, and verify its certificates.

    Raises StoreError where the run is not finished or a certificate cannot be read.
    """
    wrong, unchecked = [f"{folder / text}" for text in run_folder.unsealed(folder)], list[str]()
    for file in run_folder.made(folder, certificate.FILE):
        found = verify(file)
        wrong, unchecked = wrong + found.wrong, unchecked + found.unchecked
    return Verification(wrong, unchecked)


def verify(file: Path) -> Verification:
    """Compute every number of a certificate again from the outcomes beside it, and compare settings and data with what it says.

    Raises StoreError where the certificate cannot be read, DataError where the outcomes cannot.
    """
    known = certificate.read(file)
    content = {key: value for key, value in known.items() if key != "sha256"}
    wrong = [] if known["sha256"] == store.fingerprint(content) else [f"{file}: changed since it was sealed"]
    found = outcomes.read(file.parent / certificate.OUTCOMES)
    hashes = certificate.hashes(found)
    for cell in sorted({*hashes, *known["outcomes"]}):
        if hashes.get(cell) != known["outcomes"].get(cell):
            state = (
                "missing" if cell not in hashes else "not in the certificate" if cell not in known["outcomes"] else "changed"
            )
            wrong.append(f"{certificate.OUTCOMES}: outcomes of {cell}: {state}")
    asked = _asked(known["question"], file)
    again = json.loads(json.dumps(certificate.certify(found, asked)))
    wrong += _unequal({key: known[key] for key in again}, again, "")
    changed, unchecked = inputs.check(known["inputs"], asked.task, file.parent)
    return Verification(wrong + changed, unchecked)


def _asked(question: Mapping[str, Any], file: Path) -> Question:
    """The question, of the right types. Raises StoreError."""
    names = {field.name for field in fields(Question)}
    if set(question) != names:
        raise StoreError(f"{file}: its question lacks or adds {', '.join(sorted(set(question) ^ names))}")
    try:
        asked = TypeAdapter(Question).validate_python(dict(question))
    except ValidationError as error:
        raise StoreError(
            f"{file}: its question cannot be asked: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        ) from None
    return asked


def _unequal(stated: Any, found: Any, where: str) -> list[str]:
    """Where two plain values differ: numbers by more than rounding."""
    if isinstance(stated, dict) and isinstance(found, dict):
        keys = dict.fromkeys([*stated, *found])
        return [
            text for key in keys for text in _unequal(stated.get(key), found.get(key), f"{where}.{key}" if where else str(key))
        ]
    if isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        return [text for k, pair in enumerate(zip(stated, found, strict=True)) for text in _unequal(*pair, f"{where}[{k}]")]
    numbers = all(isinstance(value, float | int) and not isinstance(value, bool) for value in (stated, found))
    if numbers and np.isclose(stated, found, rtol=1e-6, atol=1e-9):
        return []
    return (
        []
        if type(stated) is type(found) and stated == found
        else [f"{where}: the certificate says {stated!r:.80}, the outcomes give {found!r:.80}"]
    )
