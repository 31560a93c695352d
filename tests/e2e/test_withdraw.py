"""A vector is taken back by its owner, and withdrawn while the server is killed; then an audit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from checks import audit, check_ledgers, check_model, installed_digest
from shores import RUN_S, Federation, kill, run_config, until

DOMAINS = ("garden", "kitchen", "office")
GONE, STAYING = "kitchen", ("garden", "office")


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_vector_is_withdrawn_while_the_server_is_killed(federation: Federation) -> None:
    federation.init()
    server = federation.server_up()
    clients = []
    for name in DOMAINS:
        federation.join(name)
        clients.append(federation.client_up(name))
    first = federation.start_run(run_config(federation.base))
    assert federation.finish(first)["state"] == "done"
    before = federation.summary(first)["published"]["model_digest"]
    home = ("--home", federation.server)
    assert GONE in federation.ok("run", "vectors", *home)
    assert GONE in federation.ok("run", "leave-one-out", *home, patience_s=RUN_S)
    assert set(federation.summary(first)["leave_one_out"]["without"]) == set(DOMAINS)

    unknown = federation.cli("run", "withdraw", "kitchn", *home)
    assert (unknown.returncode, "did you mean 'kitchen'?" in unknown.stderr) == (2, True)
    federation.ok("client", "withdraw", "--home", federation.home(GONE))
    status = json.loads(federation.ok("server", "status", *home, "--json"))
    assert status["withdrawals_asked"] == [{"run": first, "domain": GONE}]
    run = federation.ok("run", "withdraw", GONE, *home).split(":")[0]
    until("the withdrawal to begin", lambda: federation.server_status(run).get("phase"), patience_s=RUN_S)
    kill(*federation.alive("isthmus", "server"))
    until("all of it to die", lambda: not federation.alive(under=federation.server), patience_s=90)
    server = federation.server_up()
    assert "done" in federation.ok("run", "withdraw", GONE, *home, "--wait", patience_s=2 * RUN_S)
    assert federation.state(run)["state"] == "done"

    after = federation.summary(run)["published"]["model_digest"]
    assert after != before
    check_model(federation.server / "runs" / run / "model")
    assert {name: installed_digest(federation, name) for name in DOMAINS} == {
        **dict.fromkeys(STAYING, after),
        GONE: before,
    }
    check_ledgers(federation, DOMAINS)
    _check_audit(federation, first)
    assert federation.cli("client", "rollback", "--home", federation.home("office")).returncode == 2

    again = federation.start_run(run_config(federation.base, run={"quorum": 2}))
    assert federation.finish(again)["state"] == "done"
    assert federation.summary(again)["domains"][GONE]["lost"] == "withdrawn"
    check_ledgers(federation, DOMAINS)
    for process in (*clients, server):
        assert federation.interrupt(process) == 0


def _check_audit(federation: Federation, run: str) -> None:
    withdrawn = {domain["domain"]: domain["withdrawn"] for domain in audit(federation, DOMAINS)["domains"]}
    assert [withdrawn[name] for name in STAYING] == [[], []]
    (entry,) = withdrawn[GONE]
    assert (entry["run"], entry["told"], entry["asked"]) == (run, True, True)
    folder = federation.folder / "audit"
    said = federation.ok("audit", "verify", folder / "bundle", "--root", folder / "root.json")
    assert f"withdrawn, as it asked: the task vector of run {run}" in said
    rows: list[dict[str, Any]] = json.loads(
        federation.ok("audit", "show", folder / "bundle", "--kind", "revocation", "--format", "json")
    )
    assert {row["shore"] for row in rows if row["type"] == "parcel"} == {"server", *DOMAINS}
