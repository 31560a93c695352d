"""Joining over a real enrolment service, and what both command lines show of it."""

import json
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from localgrid import LocalFederation, pico_run_config
from typer.testing import CliRunner

from clients.cli import app as client_command
from clients.home import ClientConfig, ClientHome
from clients.join import join, node_key
from clients.policy import EgressPolicy, write_policy
from common.errors import (
    ConfigError,
    DataError,
    LedgerError,
    RefusedError,
    SignatureError,
    TransportError,
)
from common.kit import JoinKit, read_kit
from common.ledger import Crossing
from common.processes import free_ports
from server.cli import app as server_command
from server.cli import create_run, run_app
from server.kit import write_kit
from server.superlink import fab_sha256


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, pico_model: Path, make_domain: Callable[..., Any]
) -> Iterator[LocalFederation]:
    with LocalFederation(
        tmp_path_factory.mktemp("joining"), pico_model, make_domain, ("toys",)
    ) as federation:
        yield federation


@pytest.fixture
def data(tmp_path: Path, make_domain: Callable[..., Any]) -> Path:
    make_domain("garden").save(tmp_path / "data")
    return tmp_path / "data"


def invited(federation: LocalFederation, domain: str, tmp_path: Path) -> JoinKit:
    path = tmp_path / f"{domain}.kit.json"
    write_kit(federation.server(), domain, path)
    return read_kit(path)


def joined(kit: JoinKit, path: Path, data: Path, federation: LocalFederation, **changes: Any) -> ClientHome:
    facts = {"data": data, "base": str(federation.base), "supernode_port": 19094, **changes}
    return join(kit, path, **facts)


def test_a_home_is_made_and_keys_stay(federation: LocalFederation, tmp_path: Path, data: Path) -> None:
    kit = invited(federation, "garden", tmp_path)
    home = joined(kit, tmp_path / "home", data, federation, policy=EgressPolicy(min_users=77))
    assert home.config.domain == "garden"
    assert home.config.approved_fabs == (fab_sha256(),)
    assert home.policy.min_users == 77
    assert home.server_key == federation.server().identity.public
    assert home.config.pseudonym == federation.server().pseudonym("garden")
    assert stat.S_IMODE(home.keys.stat().st_mode) == 0o700
    for name in ("identity.key", "tls.key", "flower.key", "superexec.secret"):
        assert stat.S_IMODE((home.keys / name).stat().st_mode) == 0o600, name
    with pytest.raises(ConfigError, match="already"):
        joined(kit, tmp_path / "home", data, federation)
    with pytest.raises(RefusedError) as caught:  # somebody else with the same kit
        joined(kit, tmp_path / "thief", data, federation)
    assert caught.value.reason == "token"
    assert not (tmp_path / "thief" / "client.toml").exists()


def test_a_broken_link_costs_no_key_and_no_invitation(
    federation: LocalFederation, tmp_path: Path, data: Path
) -> None:
    kit = invited(federation, "office", tmp_path)
    nobody = kit.model_copy(update={"enrol": f"127.0.0.1:{free_ports(1)[0]}"})
    with pytest.raises(TransportError):
        joined(nobody, tmp_path / "home", data, federation)
    keys = {path.name: path.read_bytes() for path in (tmp_path / "home" / "keys").glob("*.key")}
    assert set(keys) == {"identity.key", "log.key", "tls.key", "flower.key"}
    joined(kit, tmp_path / "home", data, federation)
    assert keys == {name: (tmp_path / "home" / "keys" / name).read_bytes() for name in keys}
    (tmp_path / "home" / "client.toml").unlink()  # the answer was lost: the same keys may ask again
    joined(kit, tmp_path / "home", data, federation)


def test_what_is_wrong_is_found_before_anything_is_sent(
    federation: LocalFederation, tmp_path: Path, data: Path
) -> None:
    kit = invited(federation, "travel", tmp_path)
    path = tmp_path / "home"
    with pytest.raises(SignatureError, match="fingerprint disagree"):
        joined(kit.model_copy(update={"fingerprint": "0" * 16}), path, data, federation)
    with pytest.raises((ConfigError, DataError)):
        joined(kit, path, tmp_path / "no data", federation)
    with pytest.raises(ValueError, match="no base"):
        joined(kit, path, data, federation, base=str(tmp_path / "no base"))
    assert not path.exists()
    joined(kit, path, data, federation)


def test_the_node_key_is_kept(tmp_path: Path) -> None:
    public = node_key(tmp_path / "flower.key")
    assert public.startswith(b"ecdsa-sha2-nistp384 ")
    assert node_key(tmp_path / "flower.key") == public


def test_the_owners_file(federation: LocalFederation, tmp_path: Path) -> None:
    home = federation.owner("toys")
    assert ClientConfig.model_validate(home.config.model_dump()) == home.config
    with pytest.raises(ConfigError, match=r"policy\.toml is missing"):
        ClientHome.write_config(tmp_path, home.config)
        ClientHome(tmp_path)
    write_policy(tmp_path)
    ClientHome.write_config(tmp_path, home.config.model_copy(update={"max_training_minutes": 2.5}))
    assert ClientHome(tmp_path).config.max_training_minutes == 2.5
    (tmp_path / "client.toml").write_text((tmp_path / "client.toml").read_text() + "[policy]\n")
    with pytest.raises(ConfigError, match="unknown key 'policy'"):
        ClientHome(tmp_path)
    with pytest.raises(ConfigError, match="not an owner's home"):
        ClientHome(tmp_path / "nowhere")


@pytest.mark.parametrize("side", ["owner", "server"])
def test_a_home_does_not_open_over_a_ledger_that_lost_entries(
    federation: LocalFederation, tmp_path: Path, side: str
) -> None:
    home = federation.owner("toys") if side == "owner" else federation.server()
    crossing = Crossing("in", "control", "message", "a" * 64, 5, "server", "message", "demo")
    for _ in range(3):
        home.ledger.record(crossing)
    home.keep_checkpoint()
    copy = tmp_path / "copy"
    shutil.copytree(home.path, copy)
    lines = (copy / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(LedgerError, match="some are gone"):
        _ = type(home)(copy).ledger


def test_commands_of_the_owner(federation: LocalFederation, tmp_path: Path, data: Path) -> None:
    invoke = CliRunner().invoke
    invited(federation, "music", tmp_path)
    arguments = ["--data", str(data), "--home", str(tmp_path / "home"), "--base", str(federation.base)]
    join_command = ["join", str(tmp_path / "music.kit.json"), *arguments]
    refused = invoke(client_command, [*join_command, "--fingerprint", "87ba 3fd7"])
    assert isinstance(refused.exception, SignatureError)
    assert not (tmp_path / "home").exists()
    shown = invoke(client_command, join_command)
    assert shown.exit_code == 0, shown.output
    told = federation.server().identity.public.fingerprint.upper().replace(" ", "")
    again = invoke(client_command, [*join_command, "--fingerprint", told])
    assert isinstance(again.exception, ConfigError)  # compared, and past it: there is a home now
    assert federation.server().identity.public.fingerprint in shown.output
    assert "never asks for an interaction" in shown.output
    home = ["--home", str(tmp_path / "home")]
    record = json.loads(invoke(client_command, ["status", "--json", *home]).output)
    nothing = {"vectors": 0, "unprotected": 0, "epsilon": 0, "delta": 0}
    facts = {"domain": "music", "server": "pico", "now": {}, "model": None, "comparison": None}
    assert record == {**facts, "withdrawn": False, "privacy": nothing}
    assert "music: idle" in invoke(client_command, ["status", *home]).output
    refused = invoke(client_command, ["recommend", "--history", "i001", *home])
    assert isinstance(refused.exception, ConfigError)
    assert "no universal model" in str(refused.exception)


def test_commands_of_the_operator(federation: LocalFederation, tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    home = ["--home", str(federation.server_path)]
    shown = invoke(
        server_command, ["init", "--home", str(tmp_path / "new"), "--port", "9301", "--host", "a.example"]
    )
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "new" / "server.toml").exists()
    kit = tmp_path / "new.kit.json"
    assert invoke(server_command, ["invite", "poetry", "--out", str(kit), *home]).exit_code == 0
    assert read_kit(kit).domain == "poetry"

    none = invoke(run_app, ["status", "--home", str(tmp_path / "new")])
    assert "there is no run" in str(none.exception)
    run = create_run(federation.server(), pico_run_config(federation.base))
    name = run.spec.run_id
    assert name in invoke(run_app, ["list", *home]).output
    assert f"{name}: pending" in invoke(run_app, ["status", name[:-2], *home]).output
    record = json.loads(invoke(server_command, ["status", "--json", *home]).output)
    assert record["services"] == {"superlink": False, "fleet": False, "exchange": True, "enrol": True}
    assert "toys" in [member["domain"] for member in record["members"]]
    assert record["runs"][-1]["state"] == "pending"
    assert "will stop" in invoke(run_app, ["stop", name, *home]).output
    assert run.stop_asked
    run.set_state("stopped")
    assert isinstance(invoke(run_app, ["stop", name, *home]).exception, ConfigError)


def test_a_run_is_checked_before_anybody_trains(federation: LocalFederation) -> None:
    config = pico_run_config(federation.base)
    wrong = config.model_copy(
        update={"merge": (config.merge[0].model_copy(update={"options": {"scal": 1}}),)}
    )
    with pytest.raises(ConfigError, match="scal"):
        create_run(federation.server(), wrong)


def test_a_revoked_member_takes_no_part(federation: LocalFederation, tmp_path: Path, data: Path) -> None:
    joined(invited(federation, "yachts", tmp_path), tmp_path / "home", data, federation)
    federation.server().members.revoke("yachts", ledger_size=0)
    members = create_run(federation.server(), pico_run_config(federation.base)).spec.members
    assert "toys" in members
    assert "yachts" not in members
