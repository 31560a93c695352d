"""Fixtures of the end-to-end tests: a federation whose processes end with the test, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from shores import Federation

_REPORT = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Keep the outcome of the test itself, so that the fixture knows whether to print logs."""
    report = yield
    if report.when == "call":
        item.stash[_REPORT] = report
    return report


@pytest.fixture
def federate(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Path], Federation]]:
    """`federate(base)` makes a federation in the test's folder; logs are printed when the test failed."""
    made: list[Federation] = []

    def make(base: Path) -> Federation:
        made.append(Federation(tmp_path / f"federation-{len(made)}", base))
        return made[-1]

    yield make
    report = request.node.stash.get(_REPORT, None)
    for federation in made:
        federation.close()
        if report is None or report.failed:
            print(federation.tails())


@pytest.fixture
def federation(federate: Callable[[Path], Federation], pico_model: Path) -> Federation:
    """An empty federation on the pico model."""
    return federate(pico_model)
