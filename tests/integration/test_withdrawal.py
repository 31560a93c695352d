"""Withdrawing a vector: revoked, merged without, published to the others, and shown by both ledgers."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from localgrid import (
    KilledError,
    LocalFederation,
    dying,
    pico_run_config,
    resolve,
    unreachable,
)
from safetensors.torch import load_file
from typer.testing import CliRunner

from clients.cli import app as client_app
from clients.exchange_client import ExchangeClient
from clients.export import export as export_owner
from clients.serving import current
from common.audit.bundle import Bundle
from common.audit.outcome import AuditReport
from common.audit.verify import verify
from common.audit.withdrawals import NOT_MERGED
from common.errors import FederationError, RefusedError
from common.ledger import Ledger
from common.models.base import model_digest
from common.parcels import Kind
from server import rounds, withdrawal
from server.cli import app as server_app
from server.cli import create_run
from server.export import export as export_server
from server.federation import Control
from server.home import ServerHome
from server.roots import newest_root
from server.rounds import admitted, execute
from server.runs import Run
from server.store import StoredParcel
from server.withdrawal import asked, execute_withdrawal, withdraw

DOMAINS = ("books", "garden", "toys")
GONE, STAYING = "garden", ("books", "toys")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between polls and retries."""
    for module in (rounds, withdrawal):
        monkeypatch.setattr(module, "Control", partial(Control, sleep_s=0.0))
    monkeypatch.setattr("server.federation.RETRY_S", (0.0,))


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, pico_model: Path, make_domain: Callable[..., Any]
) -> Iterator[LocalFederation]:
    """Three domains for every test here: each test has vectors of its own, by its own seed."""
    folder = tmp_path_factory.mktemp("withdrawals")
    with LocalFederation(folder, pico_model, make_domain, DOMAINS) as federation:
        yield federation


SEEDS = count(1)


@pytest.fixture
def seed() -> int:
    return next(SEEDS)


def started(federation: LocalFederation, seed: int, **run: Any) -> Run:
    config = pico_run_config(federation.base, seed=seed, **run)
    merge = tuple(method for method in config.merge if method.method == "task-arithmetic")
    config = config.model_copy(update={"merge": merge, "publish": "task-arithmetic"})
    return create_run(federation.server(), config)


@pytest.fixture
def done(federation: LocalFederation, seed: int) -> Run:
    """A finished run of all three."""
    run = started(federation, seed)
    execute(federation.grid(), federation.server(), run)
    return run


def summary_of(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.folder / "summary.json").read_text()))


def audited(federation: LocalFederation) -> AuditReport:
    folder = federation.folder / f"bundle-{len(list(federation.folder.glob('bundle-*')))}"
    bundle = Bundle(folder, create=True)
    export_server(federation.server_path, bundle, payloads=True)
    for domain in DOMAINS:
        export_owner(federation.path(domain), bundle, payloads=True)
    return verify(bundle, newest_root(federation.server()).root)


def flat(path: Path) -> torch.Tensor:
    """All values of a vector's file, in the order of its tensors' names."""
    tensors = load_file(path)
    return torch.cat([tensors[name].double().ravel() for name in sorted(tensors)])


def vector_of(home: ServerHome, run: Run, domain: str) -> Path:
    return admitted(home, run, Kind.TASK_VECTOR, domain).payload


def test_the_others_get_a_model_without_it_and_both_ledgers_show_it(
    federation: LocalFederation, done: Run
) -> None:
    vector, before = vector_of(federation.server(), done, GONE), model_digest(done.folder / "model")
    tau = flat(vector)
    grid = federation.grid()
    run = withdraw(federation.server(), GONE)
    assert withdraw(federation.server(), GONE, done.spec.run_id).spec == run.spec
    execute_withdrawal(grid, federation.server(), run)
    for named in ("", done.spec.run_id, run.spec.run_id):
        assert withdraw(federation.server(), GONE, named).spec == run.spec

    assert run.state["state"] == "done"
    assert Counter(grid.asked) == {
        **{(domain, "revoke"): 1 for domain in DOMAINS},
        **{(domain, "install"): 1 for domain in STAYING},
    }
    after = model_digest(run.folder / "model")
    assert after != before
    installed = {domain: model_digest(current(federation.path(domain))) for domain in DOMAINS}
    assert installed == {"books": after, "toys": after, GONE: before}
    record = json.loads((run.folder / "model" / "merge.json").read_text())
    assert set(record["domains"]) == {federation.server().pseudonym(domain) for domain in STAYING}

    (revocation,) = (s.digest for s in published(federation, done, Kind.REVOCATION))
    for domain in DOMAINS:
        heard = [
            (entry.body["direction"], entry.body["type"])
            for entry in Ledger(federation.path(domain) / "ledger.jsonl")
            if (entry.body["kind"], entry.body["run"]) == ("revocation", done.spec.run_id)
        ]
        assert heard == [("in", "parcel"), ("out", "receipt")]
    told = [
        (entry.body["direction"], entry.body["type"], entry.body["peer"])
        for entry in federation.server().ledger
        if (entry.body["kind"], entry.body["run"]) == ("revocation", done.spec.run_id)
    ]
    assert revocation in {entry.body["digest"] for entry in federation.server().ledger}
    assert sorted(told) == sorted(
        [("out", "parcel", d) for d in DOMAINS] + [("in", "receipt", d) for d in DOMAINS]
    )
    assert not vector.exists()
    assert vector_of(federation.server(), done, "toys").exists()
    # what withdrawing cannot take back: who kept the model from before can compute the vector
    both = [flat(r.folder / "merges" / "task-arithmetic" / "vector.safetensors") for r in (done, run)]
    assert torch.cosine_similarity(both[0] - both[1], tau, dim=0) > 0.999

    summary = summary_of(run)
    assert summary["withdrawal"]["run"] == done.spec.run_id
    assert summary["domains"][GONE]["lost"] == "withdrawn"
    assert set(summary["results"]["universal"]) == set(summary["results"]["fine-tuned"]) == set(STAYING)
    assert summary_of(done)["domains"][GONE]["withdrawn"] == run.spec.run_id
    assert run.spec.run_id in (done.folder / "report.html").read_text()

    for domain, word in {GONE: "was withdrawn", "toys": "model: "}.items():
        status = CliRunner().invoke(client_app, ["status", "--home", str(federation.path(domain))])
        assert word in status.output and ("was withdrawn" in status.output) == (domain == GONE)
    rollback = CliRunner().invoke(client_app, ["rollback", "--home", str(federation.path("toys"))])
    assert "withdrew" in str(rollback.exception)
    _check_audit(federation, done)


def _check_audit(federation: LocalFederation, done: Run) -> None:
    """The books are clean, and say whose vector was withdrawn, and that its owner was told."""
    report = audited(federation)
    assert report.clean, report.all_findings
    withdrawn = [
        (domain.domain, entry)
        for domain in report.domains
        for entry in domain.withdrawn
        if entry["run"] == done.spec.run_id
    ]
    ((domain, entry),) = withdrawn
    assert domain == GONE
    assert (entry["told"], entry["shore"]) == (True, GONE)
    body = Ledger(federation.path(GONE) / "ledger.jsonl")[int(entry["index"])].body
    assert (body["kind"], body["run"], body["digest"]) == ("task-vector", done.spec.run_id, entry["vector"])
    assert all(NOT_MERGED in domain.not_proven for domain in report.domains)


def test_an_owner_takes_its_own_vector_back(federation: LocalFederation, done: Run, seed: int) -> None:
    home, owner = ["--home", str(federation.server_path)], ["--home", str(federation.path(GONE))]
    for _ in range(2):
        said = CliRunner().invoke(client_app, ["withdraw", *owner])
        assert said.exit_code == 0, said.output
        assert said.output.startswith(done.spec.run_id)
    assert CliRunner().invoke(client_app, ["withdraw", "nothing", *owner]).exit_code != 0
    rows = [entry.body for entry in Ledger(federation.path(GONE) / "ledger.jsonl")]
    crossed = [
        (body["direction"], body["type"])
        for body in rows
        if (body["kind"], body["run"]) == ("revocation", done.spec.run_id)
    ]
    assert crossed == [("out", "parcel"), ("in", "receipt")]
    assert asked(federation.server()) == [{"run": done.spec.run_id, "domain": GONE}]
    status = CliRunner().invoke(server_app, ["status", *home])
    assert f"isthmus run withdraw {GONE} --run {done.spec.run_id}" in status.output
    assert _audited_withdrawal(federation, done) == {"told": False, "asked": True, "revocation": False}

    later = started(federation, seed, quorum=2)  # the same fine-tuning: this owner does not send it again
    execute(federation.grid(), federation.server(), later)
    assert summary_of(later)["domains"][GONE]["lost"] == "withdrawn"
    assert verdicts(federation, later) == []

    run = withdraw(federation.server(), GONE, done.spec.run_id)
    execute_withdrawal(federation.grid(), federation.server(), run)
    assert run.state["state"] == "done"
    assert asked(federation.server()) == []
    assert _audited_withdrawal(federation, done) == {"told": True, "asked": True, "revocation": True}


def _audited_withdrawal(federation: LocalFederation, done: Run) -> dict[str, bool]:
    report = audited(federation)
    assert report.clean, report.all_findings
    (domain,) = [domain for domain in report.domains if domain.domain == GONE]
    (entry,) = [entry for entry in domain.withdrawn if entry["run"] == done.spec.run_id]
    return {name: bool(entry[name]) for name in ("told", "asked", "revocation")}


def published(federation: LocalFederation, run: Run, kind: Kind) -> list[StoredParcel]:
    return federation.server().store.find(direction="out", run=run.spec.run_id, kind=kind)


def test_the_vector_is_never_admitted_merged_or_given_out_again(
    federation: LocalFederation, done: Run, seed: int
) -> None:
    grid = federation.grid()
    late = started(federation, seed, quorum=2)  # has the vector already when it is withdrawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "run_merge", lambda *_, **__: killed())
        with pytest.raises(KilledError):
            execute(grid, federation.server(), late)
    run = withdraw(federation.server(), GONE, done.spec.run_id)
    execute(grid, federation.server(), late)
    assert late.state["state"] == "done"
    assert (summary_of(late)["domains"][GONE]["lost"], late.merged_domains) == ("withdrawn", list(STAYING))

    heard_nothing = started(federation, seed, quorum=2)  # the same fine-tuning gives the same vector
    execute(grid, federation.server(), heard_nothing)
    assert verdicts(federation, heard_nothing) == ["withdrawn"]
    assert heard_nothing.merged_domains == list(STAYING)

    assert (GONE, "contribute", {"status": "refused", "code": "withdrawn"}) in grid.replies
    execute_withdrawal(grid, federation.server(), run)

    all_of_them = started(federation, seed)
    with pytest.raises(FederationError, match="garden: withdrawn"):
        execute(federation.grid(), federation.server(), all_of_them)

    home = federation.server()
    for stored in home.store.find(direction="out", run=done.spec.run_id):
        if stored.kind is not Kind.REVOCATION:
            owner = federation.owner("toys")
            address = f"127.0.0.1:{home.config.ports.exchange}"
            client = ExchangeClient(address, owner.tls, owner.gate, owner.server_key)
            with pytest.raises(RefusedError) as caught:
                client.fetch(stored.digest, owner.path / "elsewhere")
            assert caught.value.reason == "withdrawn"
    assert audited(federation).clean


def verdicts(federation: LocalFederation, run: Run) -> list[str]:
    """What the server's ledger says of the vectors that the withdrawn domain offered in a run."""
    return [
        entry.body["verdict"]
        for entry in federation.server().ledger
        if (entry.body["run"], entry.body["peer"]) == (run.spec.run_id, GONE)
        and (entry.body["kind"], entry.body["type"]) == ("task-vector", "parcel")
    ]


def killed() -> Any:
    raise KilledError


def test_what_cannot_be_withdrawn_is_refused_and_who_is_away_keeps_nobody_waiting(
    federation: LocalFederation, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = federation.server()
    for arguments, said in {
        ("gardn",): "not a member",
        (GONE, "nothing"): "no run is called",
        (GONE, started(federation, 0).spec.run_id): "is pending",
    }.items():
        with pytest.raises(FederationError, match=said):
            withdraw(home, *arguments)
    _withdraw_from_one_who_is_away(federation, monkeypatch)
    with pytest.raises(FederationError, match=r"1 of the vectors .* would be left, 2 are needed"):
        withdraw(home, "toys", done.spec.run_id)
    assert len(published(federation, done, Kind.REVOCATION)) == 1

    run = withdraw(home, "toys", done.spec.run_id, remerge=False)
    execute_withdrawal(federation.grid(), home, run)
    assert run.state["state"] == "done"
    assert not (run.folder / "model").exists()
    report = audited(federation)
    assert report.clean
    told = {
        domain.domain: entry["told"]
        for domain in report.domains
        for entry in domain.withdrawn
        if entry["run"] == done.spec.run_id
    }
    assert told == {GONE: False, "toys": True}


def _withdraw_from_one_who_is_away(federation: LocalFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    passed_s = 0.0

    def away(domain: str, _action: str, message: Message) -> Message | None:
        nonlocal passed_s
        if domain != GONE:
            return None
        passed_s += withdrawal.TELL_S
        return unreachable(message)

    clock = partial(Control, sleep_s=0.0, clock=lambda: time.time() + passed_s)
    with monkeypatch.context() as patch:
        patch.setattr(withdrawal, "Control", clock)
        run = withdraw(federation.server(), GONE)
        execute_withdrawal(federation.grid(away), federation.server(), run)
    assert run.state["state"] == "done"


DEATHS: list[tuple[str, dict[str, Any]]] = [  # in the order of a withdrawal
    ("server.withdrawal.seal_parcel", {}),
    ("server.store.ParcelStore.publish", {"after": True}),
    ("server.store.ParcelStore.withdraw", {}),
    ("server.store.ParcelStore.withdraw", {"after": True, "call": 2}),
    ("server.withdrawal.run_merge", {"after": True}),
    ("revoke", {}),
    ("server.rounds.write_vector", {"after": True}),
    ("server.rounds.publish", {}),
    ("server.rounds.publish", {"after": True}),
    ("server.store.ParcelStore.publish", {"after": True}),
    ("install", {}),
    ("server.store.ParcelStore.forget_object", {"after": True}),
    ("server.withdrawal.write_results", {"after": True}),
    ("server.withdrawal.amend_results", {"after": True}),
    ("server.store.ParcelStore.close_run", {"after": True}),
]


def test_killed_at_every_step_it_ends_the_same(
    federation: LocalFederation, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed, the command is typed again or the run goes on; owners do everything once."""
    asked: list[tuple[str, str]] = []
    for name, options in [*DEATHS, ("", {})]:
        grid = federation.grid()
        with monkeypatch.context() as patch:
            if name in ("revoke", "install"):
                grid.intercept = federation.killed_after(name)
            elif name:
                patch.setattr(name, dying(resolve(name), **options))
            with pytest.raises(KilledError) if name else nullcontext():
                run = withdraw(federation.server(), GONE)
                execute_withdrawal(grid, federation.server(), run)
        asked += grid.asked

    mine = [run for run in federation.server().runs.all() if run.spec.withdrawal]
    (run,) = [run for run in mine if run.spec.withdrawal and run.spec.withdrawal.run == done.spec.run_id]
    assert run.state["state"] == "done"
    assert not vector_of(federation.server(), done, GONE).exists()
    after = model_digest(run.folder / "model")
    assert [model_digest(current(federation.path(domain))) for domain in STAYING] == [after, after]
    assert len(published(federation, run, Kind.UNIVERSAL_MODEL)) <= 2
    told = Counter(
        entry.body["peer"]
        for entry in federation.server().ledger
        if (entry.body["kind"], entry.body["type"], entry.body["direction"])
        == ("revocation", "parcel", "out")
        and entry.body["run"] == done.spec.run_id
    )
    assert told == dict.fromkeys(DOMAINS, 1)
    assert max(Counter(asked).values()) <= 2
    _check_audit(federation, done)
