"""The owner's ClientApp and runner: whatever goes wrong, only codes leave, and the runner lives on."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from clients import app as client_app
from clients import runner
from clients.app import answer
from common.config import RunConfig
from common.errors import (
    BaseMismatchError,
    FederationError,
    GateError,
    IsthmusError,
    LedgerError,
    RefusedError,
    StorageError,
    TransportError,
)
from common.ledger import Ledger
from common.orders import CONTRIBUTE, Order
from common.signing import SigningKey

KEY = SigningKey(bytes(range(32)))
SECRET = "jane.doe@example.com"


@pytest.fixture
def home(tmp_path: Path) -> Any:
    return SimpleNamespace(
        server_key=KEY.public,
        config=SimpleNamespace(domain="toys", server=SimpleNamespace(name="lab")),
        ledger=Ledger(tmp_path / "ledger.jsonl"),
    )


def envelope() -> bytes:
    return Order(CONTRIBUTE, "demo-1", "toys", RunConfig(), "b" * 64).sign(KEY)


def outcome(home: Any, error: BaseException | None) -> dict[str, str]:
    def carry_out(*_: Any) -> None:
        if error is not None:
            raise error

    return answer(home, SimpleNamespace(carry_out=carry_out), envelope())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (None, "done", "ok"),
        (TransportError(SECRET), "failed", "transport"),
        (StorageError(SECRET), "failed", "storage"),  # the disk may be freed
        (FederationError(SECRET), "failed", "federation"),  # a trainer that was killed
        (ValueError(SECRET), "failed", "internal"),
        (MemoryError(SECRET), "failed", "internal"),
        (RefusedError(SECRET, reason="quota"), "refused", "quota"),
        (GateError(SECRET), "refused", "gate"),
        (LedgerError(SECRET), "refused", "ledger"),
        (BaseMismatchError(SECRET), "refused", "base-mismatch"),
        (IsthmusError(SECRET), "refused", "error"),
    ],
)
def test_every_outcome_is_a_status_and_a_code(
    home: Any, error: BaseException | None, status: str, code: str
) -> None:
    assert outcome(home, error) == {"status": status, "code": code}
    body = home.ledger[0].body
    assert (body["direction"], body["peer"], body["run"]) == ("in", "server", "demo-1")


def test_an_order_is_in_the_ledger_once_however_often_it_comes(home: Any) -> None:
    for _ in range(3):
        outcome(home, None)
    assert len(home.ledger) == 1


def test_what_is_no_order_is_not_recorded(home: Any) -> None:
    assert answer(home, None, b"\xff") == {"status": "refused", "code": "parcel"}  # type: ignore[arg-type]
    assert len(home.ledger) == 0


class _EnoughError(BaseException):
    """Ends the runner's loop."""


class _Source:
    """Hands out what the script says: a task, None, or an exception."""

    def __init__(self, script: list[Any]) -> None:
        self.script = script

    def acquire(self) -> Any:
        step = self.script.pop(0) if self.script else _EnoughError()
        if isinstance(step, BaseException):
            raise step
        return step


class _Task:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_the_runner_outlives_whatever_a_task_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [_Task(), _Task(), _Task()]
    script = [
        httpx.ConnectError("down"), None, tasks[0], RuntimeError("no messages"), tasks[1], tasks[2],
    ]  # fmt: skip
    failures = iter([ValueError("no function registered"), httpx.ReadTimeout("slow"), None])
    done: list[_Task] = []

    def handle(task: _Task, _home: Any) -> None:
        failure = next(failures)
        if failure is not None:
            raise failure
        done.append(task)

    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "superexec.secret").write_bytes(b"s" * 32)
    config = SimpleNamespace(supernode_port=1, domain="toys")
    fake_home = SimpleNamespace(keys=tmp_path / "keys", config=config)
    monkeypatch.setenv(client_app.HOME_VARIABLE, "to be replaced")
    monkeypatch.setattr(runner, "ClientHome", lambda _path: fake_home)
    monkeypatch.setattr(runner, "TaskSource", lambda *_: _Source(script))
    monkeypatch.setattr(runner, "finish_left_behind", lambda _home: None)
    monkeypatch.setattr(runner, "handle", handle)
    monkeypatch.setattr(runner, "time", SimpleNamespace(sleep=lambda _s: None))
    with pytest.raises(_EnoughError):
        runner.main(str(tmp_path))
    assert done == [tasks[2]]
    assert [task.closed for task in tasks] == [1, 1, 1]
    assert os.environ[client_app.HOME_VARIABLE] == str(tmp_path)
