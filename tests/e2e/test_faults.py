"""kill -9 and cut links, with real processes: the run completes, nothing is trained or sent twice."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from checks import accepted_vectors, check_ledgers, check_summary, fit_folder, fit_result, installed_digest
from proxy import Relay
from shores import Federation, kill, read_json, run_config, until, write_toml

DOMAINS = ("garden", "kitchen")
ROWS = ("zero-shot", "fine-tuned", "task-arithmetic", "universal")
ORDERS = 3  # contribute, evaluate, install
LONG_TRAINING = {"max_steps": 240, "eval_every_steps": 120, "checkpoint_every_steps": 20, "warmup_steps": 10}
ONE_MERGE = [{"method": "task-arithmetic"}]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def bring_up(federation: Federation, names: Sequence[str] = DOMAINS) -> None:
    federation.init()
    federation.server_up()
    for name in names:
        federation.join(name)
    for name in names:
        federation.client_up(name)


def check_complete(federation: Federation, run: str, names: Sequence[str] = DOMAINS) -> None:
    """The run is done; one vector a domain was accepted, and every owner has the model."""
    state = federation.finish(run)
    assert state["state"] == "done", state
    check_summary(federation.summary(run), names, ROWS)
    assert accepted_vectors(federation, run) == Counter(names)
    check_ledgers(federation, names)
    (digest,) = {installed_digest(federation, name) for name in names}
    assert digest == federation.summary(run)["published"]["model_digest"]


def steps_logged(folder: Path) -> list[int]:
    """Steps of the training curve (losses only), in the order of the file."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def training_beyond(federation: Federation, name: str, step: int) -> Callable[[], bool]:
    """Whether the owner's trainer is past that step."""

    def is_beyond() -> bool:
        status = federation.status(name)
        return status.get("phase") == "train" and status["step"] > step

    return is_beyond


def orders_sent(federation: Federation, run: str) -> Counter[str]:
    """How many orders the server sent to each domain."""
    return Counter(
        body["peer"]
        for body in federation.ledger()
        if (body["channel"], body["direction"], body["run"]) == ("control", "out", run)
    )


def test_kill_of_runner_and_trainer_during_fine_tuning(federation: Federation) -> None:
    bring_up(federation)
    run = federation.start_run(run_config(federation.base, training=LONG_TRAINING, merge=ONE_MERGE))
    until("garden to train", training_beyond(federation, "garden", 40))
    kill(federation.runner("garden"), *federation.trainers("garden"))
    reached = _newest_checkpoint(fit_folder(federation.home("garden")))
    assert reached >= 40
    before = federation.status("garden")["updated_s"]
    until("garden to train again", lambda: _trains_since(federation.status("garden"), before))
    assert federation.status("garden")["step"] > reached  # and not from the first step

    check_complete(federation, run)
    assert fit_result(federation.home("garden"))["resumed"] is True
    assert fit_result(federation.home("kitchen"))["resumed"] is False
    for name in DOMAINS:
        steps = steps_logged(fit_folder(federation.home(name)))
        assert steps == sorted(set(steps))
        assert steps[0] == 1 and steps[-1] == LONG_TRAINING["max_steps"]


def _newest_checkpoint(folder: Path) -> int:
    return max(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def _trains_since(status: dict[str, Any], before_s: float) -> bool:
    return status.get("phase") == "train" and status["step"] > 0 and status["updated_s"] > before_s


@pytest.mark.slow
def test_cut_link_then_kill_during_upload(
    federate: Callable[[Path], Federation], make_pico: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_pico(tmp_path / "wide", hidden_size=192, intermediate_size=7000, initializer_range=0.05)
    federation = federate(base)
    federation.init()
    federation.server_up()
    federation.join("kitchen")
    federation.join("garden")
    with Relay(federation.port + 1, rate=3_000_000, cut_after=4_000_000) as relay:
        _lead_through(federation.home("garden"), relay.port)
        for name in DOMAINS:
            federation.client_up(name)
        run = federation.start_run(run_config(base, merge=ONE_MERGE))
        until("the link to be cut", lambda: relay.cuts)
        until("the upload to go on", lambda: relay.total > 8_000_000)
        result = fit_result(federation.home("garden"))
        kill(federation.runner("garden"), *federation.trainers("garden"))
        size = Path(federation.home("garden") / "work").rglob("vector.safetensors").__next__().stat().st_size
        across, relay.rate = relay.total, 0
        assert size > 10_000_000 and across < size + 1_000_000
        check_complete(federation, run)
        # A resume sends what is missing. Some chunks were on the way when the link was cut.
        assert relay.total < size + 6_000_000
        assert relay.total - across < size - 4_000_000
    assert fit_result(federation.home("garden")) == result
    assert result["resumed"] is False


def _lead_through(home: Path, port: int) -> None:
    """Let an owner reach the Exchange through a relay."""
    config = tomllib.loads((home / "client.toml").read_text())
    config["server"]["exchange"] = f"127.0.0.1:{port}"
    write_toml(home / "client.toml", config)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["serverapp", "whole server"])
def test_kill_of_the_server_during_merging(federation: Federation, victim: str) -> None:
    bring_up(federation)
    learning = {"steps": 400}
    run = federation.start_run(run_config(federation.base, learning=learning))
    label = "merge mergerec-layer"
    until("the merge to learn", lambda: _step_of(federation, run, label) > 40)
    delivered = accepted_vectors(federation, run)
    if victim == "serverapp":
        kill(*federation.alive("flwr-serverapp"))
    else:
        kill(*federation.alive("isthmus", "server", "up"))
        until(
            "its processes to die with it",
            lambda: not federation.alive(under=federation.server),
            patience_s=20,
        )
    saved = read_json(federation.server / "runs" / run / "merges" / "mergerec-layer" / "state.json")["step"]
    assert saved >= 40
    before = federation.server_status(run)["updated_s"]
    if victim != "serverapp":
        federation.server_up()
    until("the merge to go on", lambda: _learns_since(federation.server_status(run), label, before))
    assert federation.server_status(run)["step"] > saved

    check_complete(federation, run)
    assert delivered == Counter(DOMAINS)
    assert orders_sent(federation, run) == Counter(dict.fromkeys(DOMAINS, ORDERS))  # nobody asked again
    lines = (federation.server / "runs" / run / "merges/mergerec-layer/trajectory.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in lines.splitlines()]
    assert steps == list(range(learning["steps"] + 1))


def _step_of(federation: Federation, run: str, phase: str) -> int:
    status = federation.server_status(run)
    return int(status["step"]) if status.get("phase") == phase else 0


def _learns_since(status: dict[str, Any], label: str, before_s: float) -> bool:
    return status.get("phase") == label and status["step"] > 0 and status["updated_s"] > before_s


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["flower-supernode", "clients.wire_gate"])
def test_kill_of_what_speaks_to_the_server(federation: Federation, victim: str) -> None:
    bring_up(federation)
    run = federation.start_run(run_config(federation.base, training=LONG_TRAINING, merge=ONE_MERGE))
    until("garden to train", training_beyond(federation, "garden", 40))
    victims = federation.alive(victim, under=federation.home("garden"))
    assert len(victims) == 1
    kill(*victims)
    check_complete(federation, run)
    assert fit_result(federation.home("garden"))["resumed"] is False
    assert (federation.home("garden") / "logs" / "runner.log").read_text().count("is ready") == 1


@pytest.mark.slow
def test_a_domain_that_never_comes_back(federation: Federation) -> None:
    names = (*DOMAINS, "office")
    federation.init()
    federation.server_up()
    for name in names:
        federation.join(name)
    for name in DOMAINS:
        federation.client_up(name)
    quorum = {"quorum": 2, "deadline_minutes": 1.5}
    run = federation.start_run(run_config(federation.base, run=quorum, merge=ONE_MERGE))
    check_complete(federation, run)
    domains = federation.summary(run)["domains"]
    assert {name: domain["lost"] for name, domain in domains.items()} == {
        "garden": "",
        "kitchen": "",
        "office": "deadline",
    }
    assert not domains["office"]["delivered"]


@pytest.mark.slow
def test_a_domain_with_another_base(federation: Federation, make_pico: Callable[..., Path]) -> None:
    other = make_pico(federation.folder / "other", seed=7)
    federation.init()
    federation.server_up()
    for name in DOMAINS:
        federation.join(name, base=other if name == "kitchen" else None)
        federation.client_up(name)

    everybody = federation.start_run(run_config(federation.base, merge=ONE_MERGE))
    assert federation.finish(everybody)["state"] == "failed"
    assert "kitchen: base-mismatch" in federation.ok("run", "status", "--home", federation.server)

    enough = federation.start_run(run_config(federation.base, run={"quorum": 1}, merge=ONE_MERGE))
    state = federation.finish(enough)
    assert state["state"] == "done", state
    summary = federation.summary(enough)
    assert summary["domains"]["kitchen"]["lost"] == "base-mismatch"
    assert summary["domains"]["garden"]["lost"] == ""
    check_summary(summary, ["garden"], ROWS)
    assert accepted_vectors(federation, enough) == Counter(["garden"])
    assert not (federation.home("kitchen") / "models" / "current").exists()


def test_what_is_refused_in_words(federation: Federation) -> None:
    federation.init()
    with _taken(federation.port + 1):
        _check_refused(federation, "server", "up", "--home", federation.server, says="in use")
    federation.server_up()
    federation.join("garden")
    config = tomllib.loads((federation.home("garden") / "client.toml").read_text())
    with _taken(config["supernode_port"]):
        _check_refused(federation, "client", "up", "--home", federation.home("garden"), says="in use")
    write_toml(federation.home("garden") / "client.toml", {**config, "wire_port": federation.port})
    _check_refused(federation, "client", "up", "--home", federation.home("garden"), says="wire gate")
    again = ["client", "join", federation.kit("garden"), "--data", federation.folder / "data" / "garden"]
    again += ["--base", federation.base]
    home = federation.home("thief")
    _check_refused(federation, *again, "--home", home, says="token")
    assert not (home / "client.toml").exists()
    _check_refused(federation, *again, "--home", federation.home("garden"), says="already")
    assert psutil.pid_exists(federation.alive("isthmus", "server", "up")[0].pid)
    assert len(json.loads((federation.server / "members.json").read_text())) == 1


def _taken(port: int) -> Any:
    import socket

    return socket.create_server(("127.0.0.1", port))


def _check_refused(federation: Federation, *arguments: object, says: str) -> None:
    """Exit code 2, one line with the error, one with the next step; no traceback, nothing left behind."""
    alive = {process.pid for process in federation.alive()}
    done = federation.cli(*arguments)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    error, *rest = done.stderr.strip().splitlines()
    assert error.startswith("error: ") and says in error, done.stderr
    assert len(rest) <= 1 and all(line.startswith("  next: ") for line in rest), done.stderr
    assert {process.pid for process in federation.alive()} == alive
