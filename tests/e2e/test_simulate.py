"""`isthmus simulate`: a whole federation by one command, refused when finished, resumed when killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checks import check_model, check_summary, fit_folder, fit_result
from shores import RUN_S, Federation, kill, read_json, run_config, synthetic, until, write_toml

from common.ledger import Ledger

DOMAINS = ("garden", "kitchen")
ROWS = ("zero-shot", "fine-tuned", "task-arithmetic", "mergerec-layer", "universal", "joint")
STEPS = 300

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]


def write_simulation(federation: Federation) -> Path:
    """Two domains, with the joint reference, and long enough to be killed while it trains."""
    folder = federation.folder / "given"
    for name in DOMAINS:
        synthetic(name, users=120).save(folder / name)
    training = {"max_steps": STEPS, "eval_every_steps": 150, "checkpoint_every_steps": 20}
    config = run_config(federation.base, name="twice", training=training)
    config["domain"] = [{"name": name, "path": name, "users": 60} for name in DOMAINS]
    return write_toml(folder / "simulation.toml", config)


def test_simulate_is_resumed_after_a_kill_and_refused_when_finished(federation: Federation) -> None:
    config, out = write_simulation(federation), federation.folder / "out"
    launcher = federation.start("simulate", "simulate", config, "--out", out)
    garden = out / "domains" / "garden"
    until("garden to train", lambda: launcher.poll() is not None or _step(garden) > 60, patience_s=RUN_S)
    assert launcher.poll() is None
    kill(*(process for process in federation.alive("isthmus", "simulate")))
    until("everything to die with the launcher", lambda: not federation.alive(), patience_s=30)
    (run,) = [path.name for path in (out / "server" / "runs").iterdir()]
    assert not (out / "summary.json").exists()

    said = federation.ok("simulate", config, "--out", out, patience_s=RUN_S)
    assert str(out / "report.html") in said
    assert federation.alive() == []
    _check_folder(out, run)
    assert fit_result(garden)["resumed"] is True

    again = federation.cli("simulate", config, "--out", out)
    assert again.returncode == 2
    assert "finished" in again.stderr.splitlines()[0]


def _step(home: Path) -> int:
    status = read_json(home / "work" / "status.json")
    return int(status["step"]) if status.get("phase") == "train" else 0


def _check_folder(out: Path, run: str) -> None:
    assert [path.name for path in (out / "server" / "runs").iterdir()] == [run]  # the same run went on
    summary = read_json(out / "summary.json")
    check_summary(summary, DOMAINS, ROWS)
    assert summary["synthetic"] is True
    assert {"setup", "joint", "total"} <= set(summary["seconds"])
    assert set(summary["domain_seconds"]) == set(DOMAINS)
    assert all(usage["peak_memory_bytes"] > 0 for usage in summary["processes"].values())
    assert {"server/exchange", "garden/runner", "kitchen/supernode"} <= set(summary["processes"])
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"phase", "coefficients", "result", "training"} <= {event["type"] for event in events}
    assert "joint" in {event["row"] for event in events if event["type"] == "result"}
    page = (out / "report.html").read_text()
    assert "joint" in page and "ynthetic" in page and "http://" not in page.replace("http://www.w3.org", "")
    check_model(out / "model")
    for name in DOMAINS:
        _check_domain(out, name)


def _check_domain(out: Path, name: str) -> None:
    """One accepted vector, one receipt for it, one fine-tuning from its first step to its last."""
    server = [entry.body for entry in Ledger(out / "ledgers" / "server.jsonl")]
    own = [entry.body for entry in Ledger(out / "ledgers" / f"{name}.jsonl")]
    in_ = [
        body
        for body in server
        if (body["peer"], body["kind"], body["type"]) == (name, "task-vector", "parcel")
    ]
    sent = [body for body in own if (body["kind"], body["type"]) == ("task-vector", "parcel")]
    assert [(body["direction"], body["verdict"]) for body in in_] == [("in", "accepted")]
    assert {body["digest"] for body in sent} == {body["digest"] for body in in_}
    folder = fit_folder(out / "domains" / name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == STEPS


def test_ctrl_c_ends_a_simulation(federation: Federation) -> None:
    config, out = write_simulation(federation), federation.folder / "out"
    launcher = federation.start("simulate", "simulate", config, "--out", out)
    until("a runner", lambda: launcher.poll() is not None or federation.alive("clients.runner"))
    assert federation.interrupt(launcher) not in (0, None)
    assert federation.alive() == []
    said = (federation.folder / "typed" / "simulate.log").read_text()
    assert "Traceback" not in said
