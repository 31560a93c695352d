"""The `isthmus` command: its subcommands, those of other packages, errors as two lines and exit code 2."""

import gc
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint

import click
import pytest
from click.testing import CliRunner

from common import cli
from common.errors import ConfigError, FederationError


def test_every_command_has_a_help_line_and_loads() -> None:
    group = cli.cli
    names = group.list_commands(None)  # type: ignore[arg-type]
    assert set(names) == set(cli.HELP)
    shown = CliRunner().invoke(group, ["--help"])
    assert shown.exit_code == 0
    assert all(text[:20] in shown.output for text in cli.HELP.values())
    for name in names:
        assert CliRunner().invoke(group, [name, "--help"]).exit_code == 0


def test_an_unknown_command() -> None:
    assert CliRunner().invoke(cli.cli, ["nothing"]).exit_code == 2


def test_the_list_imports_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryPoint, "load", lambda _self: pytest.fail("loaded"))
    monkeypatch.setattr(cli, "import_module", lambda _name: pytest.fail("loaded"))
    assert CliRunner().invoke(cli.LazyGroup(name="x"), ["--help"]).exit_code == 0


def test_another_package_adds_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("ping", "tests_ping:command", cli.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda _self: click.Command("x", callback=lambda: print("pong")))
    monkeypatch.setattr(cli, "_others", lambda: {"ping": point})
    assert "ping" in cli.LazyGroup(name="x").list_commands(click.Context(cli.cli))
    assert CliRunner().invoke(cli.LazyGroup(name="x"), ["ping"]).output == "pong\n"


def _raising(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def test_an_error_is_two_lines_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "cli", _raising(ConfigError("wrong", next_step="mend it")))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: wrong\n  next: mend it\n"


def test_a_shadowed_package_is_refused_before_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "check_imports", _raising(FederationError("shadow")))
    monkeypatch.setattr(cli, "cli", lambda: pytest.fail("ran"))
    with pytest.raises(SystemExit):
        cli.main()
    assert "shadow" in capsys.readouterr().err


def test_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["isthmus", "--version"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("isthmus, version")
    assert gc.isenabled()


def test_commands_collect_garbage_though_imports_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_freeze_count()
    during: list[object] = []
    look = click.Command("look", callback=lambda: during.append(gc.isenabled()))
    monkeypatch.setattr(cli, "_others", lambda: {"look": EntryPoint("look", "tests_look:look", cli.GROUP)})
    monkeypatch.setattr(EntryPoint, "load", lambda _self: look)
    monkeypatch.setattr(sys, "argv", ["isthmus", "look"])
    monkeypatch.setattr(cli.atexit, "register", during.append)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        assert during == [gc.freeze, True]
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
