"""The ServerApp: which failure ends a run, and which leaves it open for the next process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from common.config import RunConfig
from common.errors import FederationError, StorageError, TransportError, VectorError
from common.flower import RUN_KEY
from server import app as server_app
from server.federation import StoppedError
from server.runs import DONE, FAILED, PENDING, STOPPED, Run, Runs
from server.store import OpenRun, ParcelStore


@pytest.fixture
def store(tmp_path: Path) -> ParcelStore:
    return ParcelStore(tmp_path / "store")


@pytest.fixture
def run(tmp_path: Path, store: ParcelStore, monkeypatch: pytest.MonkeyPatch) -> Run:
    runs = Runs(tmp_path / "runs")
    made = runs.create(RunConfig(), base_digest="b" * 64, tensors={}, members=("toys",))
    store.open_run(
        OpenRun(
            run=made.spec.run_id,
            base_digest="b" * 64,
            domains=frozenset({"toys"}),
            tensors={},
            rounds=3,
            metrics=frozenset(),
            max_norm=1.0,
        )
    )
    home = SimpleNamespace(runs=runs, store=store)
    monkeypatch.setattr(server_app, "ServerHome", SimpleNamespace(from_environment=lambda: home))
    monkeypatch.setattr(server_app, "time", SimpleNamespace(sleep=lambda _s: None))
    return made


def start(run: Run) -> None:
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={RUN_KEY: run.spec.run_id}
    )
    server_app.app(None, context)  # type: ignore[arg-type]


def execute_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> list[Any]:
    calls: list[Any] = []

    def execute(_grid: Any, _home: Any, run: Run) -> None:
        calls.append(run.folder)
        if error is not None:
            raise error

    monkeypatch.setattr(server_app, "execute", execute)
    return calls


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (StoppedError("the operator stopped the run"), STOPPED),
        (FederationError("1 domains delivered, the quorum is 2"), FAILED),
        (VectorError("toys: layer.weight: NaN"), FAILED),
    ],
)
def test_what_trying_again_cannot_mend_ends_the_run_and_admits_nothing_more(
    run: Run, store: ParcelStore, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    execute_raises(monkeypatch, error)
    start(run)
    opened = store.run(run.spec.run_id)
    assert opened is not None
    assert opened.closed
    assert run.state["state"] == state
    assert run.state["reason"]


@pytest.mark.parametrize("error", [StorageError("full"), TransportError("cut"), KeyError("a bug")])
def test_the_rest_leaves_it_open(
    run: Run, store: ParcelStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    execute_raises(monkeypatch, error)
    with pytest.raises(type(error)):
        start(run)
    assert run.state["state"] == PENDING
    assert not run.is_worked_on
    opened = store.run(run.spec.run_id)
    assert opened is not None
    assert not opened.closed


def test_a_run_that_is_over_or_worked_on_is_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = execute_raises(monkeypatch, None)
    with Run(run.folder).working():
        start(run)
    assert calls == []
    start(run)
    assert calls == [run.folder]
    run.set_state(DONE)
    start(run)
    assert calls == [run.folder]
