"""One complete small federation by what a deployment types, and nothing else; then Ctrl-C."""

from __future__ import annotations

import json
from typing import Any

import pytest
from checks import check_ledgers, check_model, check_no_secret, check_summary, installed_digest
from shores import RUN_S, Federation, read_json, run_config, write_toml

from clients.data.domain import Domain
from clients.training import isolation
from common.ledger import AppendOnlyLog
from common.models.base import model_digest
from common.parcels import Header, Kind

DOMAINS = ("garden", "kitchen")
ROWS = ("zero-shot", "fine-tuned", "task-arithmetic", "mergerec-layer", "universal")


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_federation_from_init_to_recommendations(federation: Federation) -> None:
    federation.init()
    server = federation.server_up()
    clients = []
    for name in DOMAINS:
        federation.join(name)
        clients.append(federation.client_up(name))

    config = write_toml(federation.folder / "run.toml", run_config(federation.base))
    said = federation.ok("run", "start", config, "--home", federation.server, "--wait", patience_s=RUN_S)
    run = said.split()[0]
    assert "done" in said

    _check_server(federation, run)
    for name in DOMAINS:
        _check_client(federation, name, federation.summary(run))
        _check_gate(federation, name)
    check_ledgers(federation, DOMAINS)
    _check_secrets(federation)

    for process in (*clients, server):
        assert federation.interrupt(process) == 0
    assert federation.alive() == []


def _check_server(federation: Federation, run: str) -> None:
    home = federation.server
    assert f"{run}: done" in federation.ok("run", "status", "--home", home)
    assert run in federation.ok("run", "list", "--home", home)
    status = json.loads(federation.ok("server", "status", "--home", home, "--json"))
    assert all(status["services"].values())
    assert [member["domain"] for member in status["members"]] == list(DOMAINS)
    assert [(record["run"], record["state"]) for record in status["runs"]] == [(run, "done")]

    folder = home / "runs" / run
    summary = read_json(folder / "summary.json")
    check_summary(summary, DOMAINS, ROWS)
    assert "joint" not in summary["results"]  # pooled data: never in a deployment
    assert all(domain["delivered"] and not domain["lost"] for domain in summary["domains"].values())
    assert summary["synthetic"] is True
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"phase", "coefficients", "result"} <= {event["type"] for event in events}
    assert (folder / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    check_model(folder / "model")
    assert model_digest(folder / "model") == summary["published"]["model_digest"]


def _check_client(federation: Federation, name: str, summary: dict[str, Any]) -> None:
    home, published, results = federation.home(name), summary["published"], summary["results"]
    assert installed_digest(federation, name) == published["model_digest"]
    status = json.loads(federation.ok("client", "status", "--home", home, "--json"))
    assert status["domain"] == name
    assert status["model"].endswith(published["model_digest"])
    for row, theirs in (("universal", "universal"), ("own", "fine-tuned")):
        sent = results[theirs][name]  # rounded when it left
        assert status["comparison"][row] == pytest.approx(sent, abs=1e-6)

    domain = Domain.load(federation.folder / "data" / name)
    history = ",".join(domain.item_ids[int(item)] for item in domain.train[0])
    said = federation.ok(
        *("client", "recommend", "--home", home, "--history", history, "-k", 5, "--compare", "--json")
    )
    found = json.loads(said)
    assert set(found) == {"universal", "own"}
    for rows in found.values():
        assert len({row["item"] for row in rows}) == 5
        assert {row["item"] for row in rows} <= set(domain.item_ids)
        assert all(row["title"] for row in rows)
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True)
    assert "chosen" in federation.ok("client", "interpolate", "--home", home)
    federation.ok("client", "recommend", "--home", home, "--history", history, "--model", "personal")


def _check_gate(federation: Federation, name: str) -> None:
    """Flower's traffic went through the wire gate alone; the trainer was isolated where it can be."""
    home = federation.home(name)
    written = [(entry.body["call"], entry.body["verdict"]) for entry in AppendOnlyLog(home / "wire.jsonl")]
    assert {verdict for _, verdict in written} == {"passed"}
    assert [call for call, _ in written].count("push-messages") >= 3
    (supernode,) = federation.alive("flower-supernode", under=home)
    ports = {link.raddr.port for link in supernode.net_connections() if link.raddr}
    assert ports
    assert federation.port not in ports
    headers = [Header.stored(path.read_bytes()) for path in (home / "outbox").glob("*.dsse")]
    (vector,) = [header for header in headers if header.kind is Kind.TASK_VECTOR]
    assert vector.training["isolated"] == int(isolation.possible())
    assert "valid" in federation.ok("client", "policy", "explain", home)


def _check_secrets(federation: Federation) -> None:
    """Private keys are where they were made, and only there; a kit holds nothing of the server's."""
    homes = [federation.home(name) for name in DOMAINS]
    check_no_secret(federation.server, [*homes, *(federation.kit(name) for name in DOMAINS)])
    for home in homes:
        others = [federation.server, *(other for other in homes if other != home)]
        check_no_secret(home, others)
    for name in DOMAINS:
        assert "PRIVATE" not in federation.kit(name).read_text()
        assert (federation.home(name) / "keys").stat().st_mode & 0o077 == 0
