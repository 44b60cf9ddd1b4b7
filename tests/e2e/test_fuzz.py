"""What the fuzzer drives, with hypothesis' bytes and with inputs that once found something
(tests/corpus/TARGET)."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fuzz_targets import TARGETS

CORPUS = Path(__file__).parents[1] / "corpus"
FOUND = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("file", FOUND, ids=lambda path: f"{path.parent.name}-{path.name[:12]}")
def test_what_a_fuzzer_found(file: Path) -> None:
    TARGETS[file.parent.name](file.read_bytes())


def test_every_target_has_inputs() -> None:
    assert {file.parent.name for file in FOUND} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60)
@given(data=st.binary(min_size=20, max_size=300))
def test_any_bytes_end_well(name: str, data: bytes) -> None:
    TARGETS[name](data)
