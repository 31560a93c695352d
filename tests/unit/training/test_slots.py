"""Trainers on one host take turns, and a dead one frees its slot."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from clients.training import slots
from common.errors import ConfigError


class _StopError(Exception):
    pass


def _stop_waiting(**_what: object) -> None:
    raise _StopError


def test_without_the_variable_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(slots.VARIABLE, raising=False)
    with slots.turn(_stop_waiting):
        pass


def test_as_many_at_once_as_there_are_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slots.VARIABLE, slots.environment(tmp_path / "s", 2)[slots.VARIABLE])
    with (
        slots.turn(_stop_waiting),
        slots.turn(_stop_waiting),
        pytest.raises(_StopError),
        slots.turn(_stop_waiting),
    ):
        pass
    with slots.turn(_stop_waiting):
        pass


def test_a_killed_trainer_frees_its_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slots.VARIABLE, f"{tmp_path}:1")
    code = "from clients.training.slots import turn\nwith turn(print):\n print('in', flush=True)\n input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with contextlib.ExitStack() as stack:
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        assert holder.stdout is not None and holder.stdout.readline() == b"in\n"
        with pytest.raises(_StopError), slots.turn(_stop_waiting):
            pass
    holder.stdin.close()
    holder.stdout.close()
    with slots.turn(_stop_waiting):
        pass


@pytest.mark.parametrize("setting", ["nonsense", ":2", "folder:0", "folder:x"])
def test_a_bad_setting_is_named(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slots.VARIABLE, setting)
    with pytest.raises(ConfigError, match=slots.VARIABLE), slots.turn(_stop_waiting):
        pass
