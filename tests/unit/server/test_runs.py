"""Runs on disk, the rounds' control over a scripted grid, and the keeper."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity

from common.config import RunConfig
from common.errors import FederationError
from common.orders import CONTRIBUTE, Order
from common.signing import SigningKey
from server import up
from server.federation import MAX_FAILURES, Control, Outcome, StoppedError
from server.runs import DONE, FAILED, PENDING, RUNNING, STOPPED, Run, Runs

DAY_S = 24 * 3600


def config(**run: Any) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "demo", **run}})


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


def create(runs: Runs, *members: str, **run: Any) -> Run:
    return runs.create(
        config(**run), base_digest="b" * 64, tensors={"w": [2, 3]}, members=members or ("toys", "books")
    )


def test_a_run_reads_back(runs: Runs) -> None:
    run = create(runs, quorum=1)
    again = runs.get(run.spec.run_id)
    assert again.spec == run.spec
    assert run.spec.run_id.startswith("demo-")
    assert (again.state["state"], again.spec.quorum) == (PENDING, 1)
    assert again.spec.deadline_s == run.spec.created_s + DAY_S
    assert create(runs).spec.quorum == 2


def test_members_and_quorum_must_fit(runs: Runs) -> None:
    with pytest.raises(FederationError, match="no domain has joined"):
        runs.create(config(), base_digest="b", tensors={}, members=())
    with pytest.raises(FederationError, match="quorum is 3, but 2"):
        create(runs, quorum=3)
    assert runs.all() == []


def test_found_by_how_it_begins(runs: Runs) -> None:
    first, second = create(runs), create(runs)
    assert runs.get(first.folder.name).folder == first.folder
    assert runs.get(first.folder.name[:-1]).folder == first.folder
    with pytest.raises(FederationError, match="several runs"):
        runs.get("demo-")
    for absent in ("nothing", "../runs", "..", "demo-x"):
        with pytest.raises(FederationError):
            runs.get(absent).spec  # noqa: B018
    assert {run.folder for run in runs.open()} == {first.folder, second.folder}


def test_a_final_state_is_never_left(runs: Runs) -> None:
    run = create(runs)
    run.set_state(RUNNING, phase="merge")
    assert not run.is_final
    run.set_state(DONE, phase="done")
    run.set_state(FAILED, reason="late")
    assert run.state["state"] == DONE
    assert runs.open() == []


def test_one_process_works_on_it(runs: Runs) -> None:
    run = create(runs)
    assert not run.is_worked_on
    with run.working() as free:
        assert free
        assert run.is_worked_on
        with Run(run.folder).working() as second:
            assert not second
    assert not run.is_worked_on


def test_stop_and_damage(runs: Runs) -> None:
    run = create(runs)
    run.stop()
    assert Run(run.folder).stop_asked
    (run.folder / "state.json").write_text("{half")
    assert Run(run.folder).state["state"] == PENDING
    (run.folder / "run.json").write_text('{"run_id": 1}')
    with pytest.raises(FederationError, match=r"run\.json: not a run"):
        _ = Run(run.folder).spec


# The control of one round


class ScriptedGrid:
    """Answers each domain from its list of replies; the last one for ever. None: no answer yet."""

    def __init__(self, **script: list[Any]) -> None:
        self.script = script
        self.nodes = {1: "books", 2: "toys"}
        self.waiting: dict[str, Message] = {}
        self.asked: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            domain = self.nodes[message.metadata.dst_node_id]
            self.asked.append(domain)
            name = "" if self._next(domain, peek=True) == "offline" else f"m{len(self.asked)}"
            if not name:
                self._next(domain)
            message.metadata.__dict__["_message_id"] = name
            self.waiting[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for name in list(message_ids):
            message = self.waiting[name]
            reply = self._next(self.nodes[message.metadata.dst_node_id])
            if reply == "error":
                yield Message(Error(5, "node unavailable"), reply_to=message)
            elif reply is not None:
                yield Message(RecordDict(reply), reply_to=message)

    def _next(self, domain: str, *, peek: bool = False) -> Any:
        script = self.script[domain]
        return script[0] if peek or len(script) == 1 else script.pop(0)


def reply(status: str, code: str = "ok") -> dict[str, ConfigRecord]:
    return {"reply": ConfigRecord({"status": status, "code": code})}


@pytest.fixture
def collect(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Outcome, ScriptedGrid, Run]]:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def go(
        *,
        delivers: Callable[[str, bool], bool] = lambda _d, done: done,
        run: Run | None = None,
        **script: Any,
    ) -> tuple[Outcome, ScriptedGrid, Run]:
        run = run or create(runs, quorum=1)
        now_s = [float(run.spec.created_s)]

        def clock() -> float:
            now_s[0] += 1.0
            return now_s[0]

        grid = ScriptedGrid(**script)
        nodes = {"books": "1", "toys": "2"}
        home = SimpleNamespace(
            identity=SigningKey(bytes(32)),
            log_message=lambda *_: None,
            member=lambda domain: SimpleNamespace(node_id=nodes[domain]),
        )
        control = Control(grid, home, run, clock, sleep_s=0.0)  # type: ignore[arg-type]

        def order(domain: str) -> Order:
            return Order(CONTRIBUTE, run.spec.run_id, domain, run.spec.config, run.spec.base_digest)

        return control.collect(run.spec.members, order, delivers, run.spec.deadline_s), grid, run

    return go


def test_what_is_there_is_not_asked_for(collect: Callable[..., Any]) -> None:
    outcome, grid, _ = collect(delivers=lambda _domain, _done: True)
    assert (outcome.delivered, outcome.lost, grid.asked) == (["books", "toys"], {}, [])


def test_errors_and_failures_are_asked_again(
    collect: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    outcome, grid, _ = collect(
        books=["offline", "error", reply("failed", "transport"), reply("done")],
        toys=[None, None, reply("failed", "internal"), reply("done")],
    )
    assert outcome.delivered == ["books", "toys"]
    assert (grid.asked.count("books"), grid.asked.count("toys")) == (4, 2)
    assert "nothing-delivered" not in caplog.text


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (reply("failed", "internal"), "internal"),
        (reply("done"), "nothing-delivered"),
        ({}, "malformed-reply"),
        ({"reply": ConfigRecord({"status": "what"})}, "malformed-reply"),
    ],
)
def test_failing_for_ever_is_lost(collect: Callable[..., Any], last: Any, code: str) -> None:
    outcome, grid, _ = collect(
        delivers=lambda domain, done: domain == "books" and done, books=[reply("done")], toys=[last]
    )
    assert (outcome.delivered, outcome.lost) == (["books"], {"toys": code})
    assert grid.asked.count("toys") == MAX_FAILURES


def test_an_absent_domain_is_waited_for_until_the_deadline(
    collect: Callable[..., Any], runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    run = create(runs, quorum=1, deadline_minutes=10)
    outcome, grid, _ = collect(run=run, books=[reply("done")], toys=["error"])
    assert outcome.lost == {"toys": "deadline"}
    assert grid.asked.count("toys") > MAX_FAILURES


def test_quorum(collect: Callable[..., Any], runs: Runs) -> None:
    outcome, _, _ = collect(books=[reply("done")], toys=[reply("refused", "gate")])
    assert (outcome.delivered, outcome.lost) == (["books"], {"toys": "gate"})
    with pytest.raises(FederationError, match=r"1 domains delivered, the quorum is 2 \(toys: gate\)"):
        collect(run=create(runs), books=[reply("done")], toys=[reply("refused", "gate")])


def test_it_ends_at_once_when_the_quorum_is_out_of_reach(collect: Callable[..., Any], runs: Runs) -> None:
    with pytest.raises(FederationError, match="0 domains delivered"):
        collect(run=create(runs), books=[None], toys=[reply("refused", "gate")])


def test_stopped(collect: Callable[..., Any], runs: Runs) -> None:
    run = create(runs)
    run.stop()
    with pytest.raises(StoppedError):
        collect(run=run, books=[None], toys=[None])


# The keeper


class KeeperBench:
    """A keeper whose Flower runs are a list and whose clock is a number."""

    def __init__(self, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        self.now_s = 1000.0
        self.broken = False
        monkeypatch.setattr(up, "start_flower_run", self._start)
        monkeypatch.setattr(up, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.keeper = up.Keeper(SimpleNamespace(runs=runs))  # type: ignore[arg-type]

    def _start(self, _home: Any, run: str) -> str:
        if self.broken:
            raise FederationError("the SuperLink is away")
        self.started.append(run)
        return "1"

    def look(self, after_s: float = 0.0) -> int:
        self.now_s += after_s
        self.keeper.look()
        return len(self.started)


@pytest.fixture
def bench(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> KeeperBench:
    return KeeperBench(runs, monkeypatch)


def test_a_new_run_is_started_once(bench: KeeperBench, runs: Runs) -> None:
    assert bench.look() == 0
    run = create(runs)
    assert bench.look() == 1
    assert bench.look(10.0) == 1  # its ServerApp is still starting
    with run.working():
        assert bench.look(up.START_GRACE_S + 1) == 1
    run.set_state(DONE)
    assert bench.look(999.0) == 1


def test_a_killed_one_goes_on_soon_and_one_that_never_began_later(bench: KeeperBench, runs: Runs) -> None:
    run = create(runs)
    assert bench.look() == 1
    assert bench.look(up.START_GRACE_S - 1) == 1
    assert bench.look(2.0) == 2
    run.set_state(RUNNING, phase="merge")
    with run.working():
        assert bench.look(60.0) == 2
    assert bench.look(1.0) == 2
    assert bench.look(1.5) == 3


def test_one_that_keeps_dying_is_given_up(bench: KeeperBench, runs: Runs) -> None:
    run = create(runs)
    for _ in range(up.MAX_STARTS + 3):
        bench.look(up.START_GRACE_S + 1)
    assert len(bench.started) == up.MAX_STARTS
    assert run.state["state"] == FAILED
    assert "server.log" in run.state["reason"]


def test_a_superlink_that_is_away_costs_no_attempt(bench: KeeperBench, runs: Runs) -> None:
    run = create(runs)
    bench.broken = True
    for _ in range(up.MAX_STARTS + 3):
        assert bench.look(1.0) == 0
    bench.broken = False
    assert bench.look(1.0) == 1
    assert not run.is_final


def test_one_run_at_a_time(bench: KeeperBench, runs: Runs) -> None:
    first = create(runs)
    first.spec  # noqa: B018
    second = create(runs)
    bench.look()
    bench.look(1.0)
    assert len(bench.started) == 1
    for run in (first, second):
        if run.folder.name == bench.started[0]:
            run.set_state(STOPPED)
    bench.look(1.0)
    assert set(bench.started) == {first.folder.name, second.folder.name}
