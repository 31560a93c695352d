"""The keeper of open runs: a new Flower run when nobody works on one, and patience with a slow start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import server.up
from common.errors import FederationError
from server.up import MAX_STARTS, START_GRACE_S, Keeper


class Scene:
    """One open run, a clock that tests turn, and a count of started Flower runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.starts, self.fails, self.states = 1000.0, 0, False, list[str]()
        self.run = SimpleNamespace(
            folder=Path("runs/first-1"),
            is_worked_on=False,
            state={"state": "running", "phase": "contribute"},
            set_state=lambda state, **_: self.states.append(state),
        )
        home: Any = SimpleNamespace(runs=SimpleNamespace(open=lambda: [self.run]))
        self.keeper = Keeper(home)
        monkeypatch.setattr(server.up.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(server.up, "start_flower_run", self._start)

    def _start(self, _home: object, _run: str) -> str:
        if self.fails:
            raise FederationError("not up yet")
        self.starts += 1
        return "7"

    def look(self, after_s: float, *, worked_on: bool) -> int:
        self.now_s += after_s
        self.run.is_worked_on = worked_on
        self.keeper.look()
        return self.starts


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_a_restarted_server_gives_a_new_process_time_to_begin(scene: Scene) -> None:
    assert scene.look(0, worked_on=False) == 1
    assert scene.look(START_GRACE_S - 1, worked_on=False) == 1
    assert scene.look(2, worked_on=False) == 2


def test_a_process_that_was_seen_to_work_and_is_gone_is_replaced_soon(scene: Scene) -> None:
    scene.look(0, worked_on=False)
    assert scene.look(10, worked_on=True) == 1
    assert scene.look(3, worked_on=False) == 2
    assert scene.look(3, worked_on=False) == 2  # the new one has its time again


def test_a_start_that_failed_is_tried_again_at_once(scene: Scene) -> None:
    scene.fails = True
    scene.look(0, worked_on=False)
    scene.fails = False
    assert scene.look(0.5, worked_on=False) == 1


def test_a_run_that_keeps_dying_is_given_up(scene: Scene) -> None:
    for _ in range(MAX_STARTS + 1):
        scene.look(3, worked_on=False)
        scene.look(1, worked_on=True)
    scene.look(3, worked_on=False)
    assert scene.starts == MAX_STARTS
    assert "failed" in scene.states
