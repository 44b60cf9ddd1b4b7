"""What Fulcrum is built on is pinned, hashed, and has a reason."""

import check_supply


def test_versions_are_locked_with_hashes_and_every_dependency_has_its_reason() -> None:
    assert check_supply.faults() == []


def test_names_are_compared_as_indexes_write_them() -> None:
    assert check_supply.plain("ruamel.yaml_X") == "ruamel-yaml-x"
    assert check_supply.pins("constraints.txt")["torch"] == "2.13.0"
    assert {"torch", "pydantic", "mutmut", "uv"} <= check_supply.direct()
