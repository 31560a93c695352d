"""Whole runs over an in-process grid: real homes, orders, gates, ledgers; an Exchange over gRPC and TLS."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from localgrid import (
    KilledError,
    LocalFederation,
    LocalGrid,
    call_owner,
    dying,
    pico_run_config,
    resolve,
    unreachable,
)

from clients.actions import Actions
from clients.data.domain import Domain
from clients.home import ClientHome
from clients.policy import EgressPolicy
from clients.runner import finish_left_behind
from clients.serving import current
from clients.training.job import ReleaseLimit
from common.errors import FederationError, GateError, IsthmusError
from common.ledger import Ledger
from common.models.base import model_digest, trainable_norm
from common.orders import CONTRIBUTE, Order
from common.parcels import Kind
from common.signing import SigningKey, seal
from common.statements import CODE_PATTERN
from server import rounds
from server.cli import create_run
from server.federation import Control, StoppedError
from server.rounds import execute
from server.runs import Run

EMAIL = "jane.doe@example.com"
ACTIONS = ("contribute", "evaluate", "install")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between polls and retries."""
    monkeypatch.setattr(rounds, "Control", partial(Control, sleep_s=0.0))
    monkeypatch.setattr("server.federation.RETRY_S", (0.0,))


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, pico_model: Path, make_domain: Callable[..., Any]
) -> Iterator[LocalFederation]:
    """Two domains that every test here may run; their homes remember, each run has its own name."""
    with LocalFederation(tmp_path_factory.mktemp("federation"), pico_model, make_domain) as federation:
        yield federation


@pytest.fixture(autouse=True)
def forget_jobs(federation: LocalFederation, smooth: Run) -> None:
    federation.jobs.clear()
    federation.fits_done.clear()


@pytest.fixture(scope="module")
def smooth(federation: LocalFederation) -> Run:
    """A run that nothing disturbed."""
    run, grid = federation.run(), federation.grid()
    execute(grid, federation.server(), run)
    assert Counter(grid.asked) == {(domain, action): 1 for domain in federation.domains for action in ACTIONS}
    assert {tuple(reply.items()) for _, _, reply in grid.replies} == {(("code", "ok"), ("status", "done"))}
    return run


def summary_of(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.folder / "summary.json").read_text()))


def test_from_first_order_to_results(federation: LocalFederation, smooth: Run) -> None:
    run = smooth
    assert run.state["state"] == "done"
    kinds = Counter(kind for _, _, kind in federation.delivered(run))
    assert kinds == {"domain-card": 2, "catalog": 2, "task-vector": 2, "metrics": 6}

    digest = model_digest(run.folder / "model")
    assert {model_digest(current(federation.path(d))) for d in federation.domains} == {digest}
    summary = summary_of(run)
    assert list(summary["results"]) == [
        "zero-shot", "fine-tuned", "task-arithmetic", "mergerec-domain", "universal",
    ]  # fmt: skip
    assert summary["results"]["universal"] == summary["results"]["mergerec-domain"]
    assert all(set(row) == set(federation.domains) for row in summary["results"].values())
    assert summary["domains"]["toys"]["delivered"]
    assert summary["synthetic"] is True
    assert summary["crossings"]["toys"]["in"]["task-vector"]["count"] == 1
    assert "mergerec-domain" in (run.folder / "report.html").read_text()
    events = [json.loads(line)["type"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert set(events) == {"phase", "coefficients", "result"}
    for domain in federation.domains:
        for name in ("README.md", "merge.json"):
            assert domain not in (run.folder / "model" / name).read_text()
        private = Domain.load(federation.path(domain).parent.parent / "data" / domain)
        crossed = (run.folder / "summary.json").read_text() + (
            federation.server_path / "ledger.jsonl"
        ).read_text()
        assert not any(user in crossed for user in private.user_ids)


def test_both_shores_tell_the_same_story(federation: LocalFederation, smooth: Run) -> None:
    run = smooth
    server = Ledger(federation.server_path / "ledger.jsonl")
    for domain in federation.domains:
        owner = Ledger(federation.path(domain) / "ledger.jsonl")
        turn = {"in": "out", "out": "in"}

        def rows(ledger: Ledger, peer: str) -> Counter[tuple[str, str, str]]:
            return Counter(
                (entry.body["direction"], entry.body["type"], entry.body["digest"])
                for entry in ledger
                if entry.body["run"] == run.spec.run_id
                and entry.body["type"] != "message"
                and entry.body["peer"] == peer
            )

        ours = rows(owner, "server")
        theirs = Counter({(turn[way], *rest): n for (way, *rest), n in rows(server, domain).items()})
        assert ours == theirs
        assert sum(ours.values()) >= 2 * 6  # 4 + 2 parcels and a receipt for each


SERVER_DEATHS: list[tuple[str, dict[str, Any]]] = [  # in the order of a run
    ("contribute", {}),
    ("server.rounds.contribute", {"after": True}),
    ("server.rounds.run_merge", {"after": True}),
    ("server.rounds.run_merge", {"call": 2}),
    ("server.rounds.write_vector", {"after": True}),
    ("server.rounds.seal_parcel", {}),
    ("server.store.ParcelStore.publish", {"after": True}),
    ("evaluate", {}),
    ("server.rounds.ask_for_metrics", {"after": True}),
    ("server.rounds.publish", {}),
    ("server.rounds.publish", {"after": True}),
    ("install", {}),
    ("server.rounds.ask_for_metrics", {"after": True, "call": 2}),
    ("server.rounds.write_results", {"after": True}),
    ("server.store.ParcelStore.close_run", {"after": True}),
]


def test_a_server_killed_in_every_phase_asks_nothing_twice_and_publishes_the_same(
    federation: LocalFederation, smooth: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = federation.run(), []
    first, second = federation.domains

    for name, options in [*SERVER_DEATHS, ("", {})]:
        grid = federation.grid()
        with monkeypatch.context() as patch:
            if name in ACTIONS:
                grid.intercept = federation.killed_after(name)
            elif name:
                patch.setattr(name, dying(resolve(name), **options))
            with pytest.raises(KilledError) if name else nullcontext():
                execute(grid, federation.server(), Run(run.folder))
        asked += grid.asked
        assert run.is_final == (not name)

    assert run.state["state"] == "done"
    # the second owner's first message died in the server's memory, unanswered
    assert Counter(asked) == {(first, a): 1 for a in ACTIONS} | {(second, a): 2 for a in ACTIONS}
    assert Counter(federation.jobs) == {
        (domain, mode): n for domain in federation.domains for mode, n in (("fit", 1), ("candidates", 2))
    }
    assert federation.delivered(run) == federation.delivered(smooth)
    assert federation.published(run) == federation.published(smooth)
    assert federation.published(run, Kind.CANDIDATE) == federation.published(smooth, Kind.CANDIDATE)
    assert model_digest(run.folder / "model") == model_digest(smooth.folder / "model")
    assert summary_of(run)["results"] == summary_of(smooth)["results"]
    assert len(federation.server().store.find(direction="out", run=run.spec.run_id)) <= 4


OWNER_DEATHS: list[tuple[str, dict[str, Any]]] = [
    ("clients.actions.Catalog.write", {}),
    ("clients.actions.ExchangeClient.send", {}),
    ("clients.actions.ExchangeClient.send", {"after": True, "call": 2}),
    ("clients.actions.run_job", {"after": True}),
    ("clients.actions.set_own_model", {}),
    ("clients.egress.EgressGate.release_reply", {}),
    ("clients.actions.ExchangeClient.fetch", {"after": True, "call": 2}),
    ("clients.actions.run_job", {"after": True, "call": 2}),
    ("clients.actions.install", {}),
    ("clients.actions.install", {"after": True, "call": 2}),
]


def test_an_owner_killed_everywhere_delivers_once(
    federation: LocalFederation, smooth: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, deaths = federation.run(), []

    def restart(domain: str, action: str, message: Message) -> Message | None:
        """Every runner that dies is started again: some finish by themselves, some are asked again."""
        for finishes_itself in (False, True) * len(OWNER_DEATHS):
            try:
                if finishes_itself:
                    finish_left_behind(federation.owner(domain))
                return call_owner(federation.path(domain), message, federation.fab)
            except KilledError:
                deaths.append((domain, action))
                if len(deaths) % 3 == 0:
                    return unreachable(message)
        raise AssertionError("dies for ever")

    for name, options in OWNER_DEATHS:
        monkeypatch.setattr(name, dying(resolve(name), **options))
    execute(federation.grid(restart), federation.server(), run)
    assert run.state["state"] == "done"
    assert len(deaths) == len(OWNER_DEATHS)
    assert federation.delivered(run) == federation.delivered(smooth)
    assert federation.published(run) == federation.published(smooth)
    vectors = {name: d["vector"]["payload_digest"] for name, d in summary_of(run)["domains"].items()}
    assert vectors == {n: d["vector"]["payload_digest"] for n, d in summary_of(smooth)["domains"].items()}
    for domain in federation.domains:
        assert model_digest(current(federation.path(domain))) == model_digest(smooth.folder / "model")
        assert Actions(federation.owner(domain)).unfinished() == []


def only(answers: Callable[[str, Message], Message | None]) -> Callable[[str, str, Message], Message | None]:
    """An intercept that meets contributions alone."""
    return lambda domain, action, message: answers(domain, message) if action == CONTRIBUTE else None


def test_an_error_reply_is_asked_again(federation: LocalFederation) -> None:
    run, errors = federation.run(), []

    def at_first(domain: str, message: Message) -> Message | None:
        errors.append(domain)
        return unreachable(message) if errors.count(domain) <= 7 else None  # more than MAX_FAILURES

    grid = federation.grid(only(at_first))
    contributed(grid, federation, run)
    assert Counter(grid.asked) == {(domain, CONTRIBUTE): 8 for domain in federation.domains}
    assert federation.jobs == [("books", "fit"), ("toys", "fit")]


def contributed(grid: LocalGrid, federation: LocalFederation, run: Run) -> None:
    """Go through the first round only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.rounds.read_inputs", dying(print))
        with pytest.raises(KilledError):
            execute(grid, federation.server(), run)


def refuse(message: Message, code: str = "policy") -> Message:
    return Message(RecordDict({"reply": ConfigRecord({"status": "refused", "code": code})}), reply_to=message)


def test_a_refusal_is_final_and_the_quorum_goes_on(federation: LocalFederation) -> None:
    run = federation.run(quorum=1)
    grid = federation.grid(only(lambda domain, message: refuse(message) if domain == "toys" else None))
    execute(grid, federation.server(), run)
    assert run.state["state"] == "done"
    assert [action for domain, action in grid.asked if domain == "toys"] == [CONTRIBUTE]
    summary = summary_of(run)
    assert (summary["domains"]["toys"]["delivered"], summary["domains"]["toys"]["lost"]) == (False, "policy")
    assert summary["domains"]["books"]["delivered"]
    assert set(summary["results"]["universal"]) == {"books"}


def test_a_vector_beyond_the_runs_norm_is_refused(federation: LocalFederation) -> None:
    base = trainable_norm(federation.base)
    assert federation.run().spec.config.run.max_norm == base
    run = federation.run(max_norm=1e-9 * base)
    with pytest.raises(FederationError, match="norm"):
        execute(federation.grid(), federation.server(), run)
    assert {stored[2] for stored in federation.delivered(run)} == {"catalog", "domain-card"}


def test_below_the_quorum_the_run_fails_and_names_who_and_why(federation: LocalFederation) -> None:
    run = federation.run()
    grid = federation.grid(only(lambda domain, message: refuse(message) if domain == "books" else None))
    with pytest.raises(FederationError, match=r"quorum is 2 \(books: policy"):
        execute(grid, federation.server(), run)
    assert len(grid.asked) == 2


def test_after_the_deadline_the_quorum_goes_on(
    federation: LocalFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation.run(quorum=1, deadline_minutes=60)
    passed_s = 0.0

    def clock() -> float:
        return time.time() + passed_s

    monkeypatch.setattr(rounds, "Control", partial(Control, sleep_s=0.0, clock=clock))
    monkeypatch.setattr(rounds, "time", SimpleNamespace(time=clock))

    def absent(domain: str, message: Message) -> Message | None:
        nonlocal passed_s
        if domain == "books":
            return None
        passed_s += 1000.0
        return unreachable(message)

    grid = federation.grid(only(absent))
    execute(grid, federation.server(), run)
    assert run.state["state"] == "done"
    assert summary_of(run)["domains"]["toys"]["lost"] == "deadline"
    assert [action for domain, action in grid.asked if domain == "books"] == list(ACTIONS)


def test_the_operator_stops_a_run(federation: LocalFederation) -> None:
    run = federation.run()

    def stop(domain: str, message: Message) -> Message:
        run.stop()
        return unreachable(message)

    with pytest.raises(StoppedError):
        execute(federation.grid(only(stop)), federation.server(), run)
    assert federation.delivered(run) == []


def test_an_owner_without_metrics_still_contributes(
    tmp_path: Path, pico_model: Path, make_domain: Callable[..., Any]
) -> None:
    policies = {"toys": EgressPolicy(metrics=()), "books": EgressPolicy(min_users=1000)}
    with LocalFederation(tmp_path, pico_model, make_domain, policies=policies) as federation:
        run, grid = federation.run(), federation.grid()
        execute(grid, federation.server(), run)
        assert run.state["state"] == "done"
        assert {kind for _, _, kind in federation.delivered(run)} == {"domain-card", "catalog", "task-vector"}
        assert len(grid.asked) == 6
        summary = summary_of(run)
        assert summary["results"] == {}
        assert all(domain["delivered"] for domain in summary["domains"].values())
        for domain in federation.domains:
            assert model_digest(current(federation.path(domain))) == model_digest(run.folder / "model")


def test_a_vector_that_tells_too_much_is_refused_by_a_code_and_nothing_is_sent(
    tmp_path: Path, pico_model: Path, make_domain: Callable[..., Any], by_heart: dict[str, Any]
) -> None:
    def make(name: str, users: int, seed: int) -> Any:
        return make_domain(name, users=16, seed=seed, random=True)

    with LocalFederation(tmp_path, pico_model, make) as federation:
        limit = ReleaseLimit(max_tpr=0.01, held_out_users=8)
        config = federation.owner("toys").config.model_copy(update={"release": limit})
        ClientHome.write_config(federation.path("toys"), config)
        config = pico_run_config(federation.base, quorum=1)
        training = config.training.model_copy(update=by_heart)
        run = create_run(federation.server(), config.model_copy(update={"training": training}))
        grid = federation.grid()
        execute(grid, federation.server(), run)
        assert ("toys", CONTRIBUTE, {"status": "refused", "code": "leakage-limit"}) in grid.replies
        assert summary_of(run)["domains"]["toys"]["lost"] == "leakage-limit"
        assert {sender for sender, _, _ in federation.delivered(run)} == {"books"}
        out = [entry.body for entry in federation.owner("toys").ledger if entry.body["direction"] == "out"]
        assert [body["type"] for body in out] == ["message"]
        (record,) = (federation.path("toys") / "work" / "fits").glob("*/leakage.json")
        assert json.loads(record.read_text())["tpr"] > 0.01


def test_an_unapproved_bundle_is_refused(federation: LocalFederation) -> None:
    run, grid = federation.run(), federation.grid()
    grid.fab = "0" * 64
    with pytest.raises(FederationError, match="bundle-not-approved"):
        execute(grid, federation.server(), run)
    assert federation.jobs == []
    assert federation.owner("toys").journal.get(f"order/{run.spec.run_id}/contribute") is None
    assert grid.replies[0][2] == {"status": "refused", "code": "bundle-not-approved"}


def test_another_base_model_is_refused_by_its_code(
    federation: LocalFederation, pico_sentence_model: Path
) -> None:
    run = create_run(federation.server(), pico_run_config(pico_sentence_model))
    with pytest.raises(FederationError, match="base-mismatch"):
        execute(federation.grid(), federation.server(), run)
    assert federation.jobs == []


@pytest.mark.parametrize(
    ("setting", "stricter"),
    [
        ("deny_tensors = []", 'deny_tensors = ["*.bias"]'),
        ("require_isolation = false", "require_isolation = true"),
    ],
)
def test_what_the_owners_policy_forbids_is_refused_before_any_work(
    federation: LocalFederation, monkeypatch: pytest.MonkeyPatch, setting: str, stricter: str
) -> None:
    run, policy = federation.run(), federation.path("toys") / "policy.toml"
    monkeypatch.setattr("clients.training.isolation.possible", lambda: False)
    before = policy.read_text()
    assert setting in before
    policy.write_text(before.replace(setting, stricter))
    try:
        with pytest.raises(FederationError, match=r"toys: policy"):
            execute(federation.grid(), federation.server(), run)
    finally:
        policy.write_text(before)
    assert ("toys", "fit") not in federation.jobs
    assert not [sent for sent in federation.delivered(run) if sent[0] == "toys"]


def test_a_trainers_result_must_be_in_its_folder(federation: LocalFederation) -> None:
    actions, home = Actions(federation.owner("toys")), federation.path("toys")
    assert actions._in_work(str(home / "work" / "r" / "vector")) == home.resolve() / "work" / "r" / "vector"
    link = home / "work" / "link"
    link.symlink_to(home / "keys")
    try:
        for outside in (home / "keys", home / "work" / ".." / "keys", link / "identity.key", home.parent):
            with pytest.raises(GateError, match="outside"):
                actions._in_work(str(outside))
    finally:
        link.unlink()


def order_to(domain: str, federation: LocalFederation, **changes: Any) -> Order:
    facts = {"action": CONTRIBUTE, "run": "forged-1", "recipient": domain, "base_digest": "0" * 64}
    return Order(config=pico_run_config(federation.base), **{**facts, **changes})


def asked_with(envelope: Any, federation: LocalFederation, action: str = CONTRIBUTE) -> dict[str, Any]:
    """What leaves owner `toys` when this comes in."""
    message = Message(RecordDict({"order": ConfigRecord({"envelope": envelope})}), 2, f"query.{action}")
    reply = call_owner(federation.path("toys"), message, federation.fab)
    return dict(reply.content.config_records["reply"])


def test_forged_orders_get_a_code_and_nothing_else(federation: LocalFederation) -> None:
    key = federation.server().identity
    stranger = SigningKey(bytes(32))
    statement = {"action": CONTRIBUTE, "run": "forged-1", "recipient": "toys", "base_digest": "0" * 64}
    unknown = {**statement, "config": "{}", "candidates": [], "data": "/home/toys"}
    order_type = "application/vnd.isthmus.order+json"
    forged = {
        "signature": [order_to("toys", federation).sign(stranger)],
        "parcel": [
            order_to("books", federation).sign(key),
            b"",
            seal(unknown, key, payload_type=order_type),
            seal({**unknown, "config": 5}, key, payload_type=order_type),
            order_to("toys", federation, run="../../books").sign(key),
            b"{}",
            "not bytes",
        ],
        "config": [
            seal({**unknown, "config": '{"run": {"nam": "x"}}'}, key, payload_type=order_type),
        ],
    }
    before = len(federation.owner("toys").journal.items("order/"))
    for code, envelopes in forged.items():
        for envelope in envelopes:
            assert asked_with(envelope, federation) == {"status": "refused", "code": code}, envelope[:200]
    assert federation.jobs == []
    assert len(federation.owner("toys").journal.items("order/")) == before


@pytest.mark.parametrize("where", ["clients.actions.Domain.load", "clients.actions.run_job"])
@pytest.mark.parametrize("error", [ValueError, IsthmusError, FederationError])
def test_no_text_of_an_exception_leaves(
    federation: LocalFederation, monkeypatch: pytest.MonkeyPatch, where: str, error: type[Exception]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error(f"line 7: {EMAIL}")

    monkeypatch.setattr(where, broken)
    run, grid = federation.run(), federation.grid()
    code = getattr(error, "code", "internal")
    with pytest.raises(FederationError, match=f"toys: {code}") as caught:
        execute(grid, federation.server(), run)
    assert {tuple(reply) for _, _, reply in grid.replies} == {("code", "status")}
    assert {reply["code"] for _, _, reply in grid.replies} == {code}
    assert re.match(CODE_PATTERN, code)
    asked = 2 if error is IsthmusError else 10  # refused once for all, or tried five times
    assert len(grid.asked) == asked
    assert EMAIL not in str(caught.value)
    for path in [federation.server_path / "ledger.jsonl", *run.folder.iterdir()]:
        assert EMAIL not in path.read_text() if path.is_file() else True
