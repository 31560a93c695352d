"""The merge server's home, its join kits and its app bundle."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, FederationError
from common.kit import read_kit
from server import superlink
from server.cli import create_home
from server.home import ServerHome
from server.kit import write_kit
from server.members import Member
from server.superlink import environment, fab_folder, fab_sha256, register_node, start_flower_run

PORTS = {"fleet": 9101, "exchange": 9102, "enrol": 9103, "superlink": 9104}
DATA = {"name": "lab", "hosts": ["merge.example", "10.0.0.1"], "bind": "127.0.0.1", "ports": PORTS}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> ServerHome:
    return create_home(tmp_path_factory.mktemp("server") / "home", DATA)


def test_keys_are_made_and_private(home: ServerHome) -> None:
    assert stat.S_IMODE(home.keys.stat().st_mode) == 0o700
    for name in ("ca.key", "tls.key", "identity.key", "superexec.secret"):
        assert stat.S_IMODE((home.keys / name).stat().st_mode) == 0o600, name
    again = ServerHome(home.path)
    assert again.identity.public == home.identity.public
    assert again.config == home.config
    assert home.address("exchange") == "merge.example:9102"


def test_a_home_is_never_made_twice_or_guessed(home: ServerHome, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already"):
        create_home(home.path, DATA)
    with pytest.raises(ConfigError, match="not a server's home"):
        ServerHome(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "Not a name"}, "server: name"),
        ({"hosts": []}, "server: hosts"),
        ({"ports": {**PORTS, "fleet": 0}}, "ports: fleet"),
        ({"ports": {**PORTS, "flet": 1}}, "unknown key 'flet'"),
    ],
)
def test_a_wrong_value_makes_no_home(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        create_home(tmp_path / "home", {**DATA, **changes})
    assert not (tmp_path / "home").exists()


def test_the_environment_names_the_home(home: ServerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment(home)
    monkeypatch.setenv("ISTHMUS_SERVER_HOME", env["ISTHMUS_SERVER_HOME"])
    assert ServerHome.from_environment().path == home.path
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_HOME"].startswith(str(home.path))
    assert 'address = "127.0.0.1:9104"' in (Path(env["FLWR_HOME"]) / "config.toml").read_text()


def test_members_and_pseudonyms(home: ServerHome) -> None:
    home.members.put(Member("toys", "domain-1", "1" * 64, "2" * 64, "PEM", "f" * 64, "12", 5))
    assert home.pseudonym("toys") == "domain-1"
    with pytest.raises(FederationError, match="'books' is not a member"):
        home.member("books")


def test_a_control_message_is_in_the_ledger_by_digest_only(home: ServerHome) -> None:
    home.log_message("out", "toys", "demo-1", b"secret order")
    body = home.ledger[len(home.ledger) - 1].body
    assert (body["direction"], body["peer"], body["type"]) == ("out", "toys", "message")
    assert body["digest"] == hashlib.sha256(b"secret order").hexdigest()
    assert b"secret order" not in (home.path / "ledger.jsonl").read_bytes()


def test_a_kit_holds_no_secret_of_the_server(home: ServerHome, tmp_path: Path) -> None:
    path = tmp_path / "toys.kit.json"
    kit = write_kit(home, "toys", path)
    assert read_kit(path) == kit
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert kit.fingerprint == home.identity.public.fingerprint
    assert kit.fab_sha256 == fab_sha256()
    for secret in ("ca.key", "tls.key", "identity.key", "superexec.secret"):
        assert (home.keys / secret).read_bytes().strip() not in path.read_bytes()
    assert kit.token not in (home.path / "invitations.json").read_text()
    assert write_kit(home, "toys", path).token != kit.token


@pytest.mark.parametrize("name", ["Toys", "../toys", "", "server", "a" * 41])
def test_a_name_that_cannot_be_a_domain(home: ServerHome, tmp_path: Path, name: str) -> None:
    with pytest.raises(FederationError, match="cannot name a domain"):
        write_kit(home, name, tmp_path / "kit.json")
    assert not (tmp_path / "kit.json").exists()


def test_what_is_not_a_kit(home: ServerHome, tmp_path: Path) -> None:
    path = tmp_path / "kit.json"
    good = write_kit(home, "toys", path).model_dump()
    for text in ("", "[]", "{", "\x00"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not a join kit"):
            read_kit(path)
    with pytest.raises(ConfigError, match="not a join kit"):
        read_kit(tmp_path / "absent.json")
    path.write_text(json.dumps({**good, "tokn": "x"}))
    with pytest.raises(ConfigError, match="tokn"):
        read_kit(path)
    path.write_text(json.dumps({**good, "schema_version": 2, "something_new": 1}))
    with pytest.raises(ConfigError, match="kit of schema 2, this Isthmus reads 1"):
        read_kit(path)


def test_the_bundle_is_the_same_bytes_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fab_sha256()
    copy = tmp_path / "elsewhere"
    shutil.copytree(fab_folder(), copy)
    for path in [copy, *copy.rglob("*")]:
        os.utime(path, (1_000_000_000, 1_000_000_000))
    (copy / "isthmus_app" / "__pycache__").mkdir(exist_ok=True)
    (copy / "isthmus_app" / "__pycache__" / "client_app.cpython-311.pyc").write_bytes(b"compiled")
    monkeypatch.setattr(superlink, "fab_folder", lambda: copy)
    assert fab_sha256() == first
    (copy / "isthmus_app" / "client_app.py").write_text("app = None\n")
    assert fab_sha256() != first


def _flwr_says(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(superlink.subprocess, "run", run)
    return commands


def test_commands_to_flower(home: ServerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = _flwr_says(monkeypatch, '{"success": true, "run-id": 7, "node-id": "9"}')
    assert start_flower_run(home, "demo-1") == "7"
    assert register_node(home, b"ecdsa-sha2-nistp384 AAAA") == 9
    assert commands[0][-3:] == ['isthmus-run="demo-1"', "--format", "json"]


@pytest.mark.parametrize(
    "answer",
    ["", "not json", '{"success": false, "error-message": "no"}', subprocess.TimeoutExpired("flwr", 60)],
)
def test_flower_that_does_not_answer(
    home: ServerHome, monkeypatch: pytest.MonkeyPatch, answer: str | Exception
) -> None:
    _flwr_says(monkeypatch, answer)
    with pytest.raises(FederationError, match="flwr run"):
        start_flower_run(home, "demo-1")
