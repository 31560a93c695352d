"""One simulation from configuration to report: data, federation, joint reference, one folder of results.

    out/config.json       the resolved configuration
    out/data/<domain>/    prepared data        out/domains/<domain>/  the owner's home
    out/server/           the server's home    out/launcher/          logs of the launcher
    out/summary.json, metrics.jsonl, report.html, model/, ledgers/

Interrupted, it goes on from what is on disk. A folder with a finished run is never overwritten by accident.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clients.data.assemble import Settings
from clients.data.domain import Domain
from clients.data.prepare import prepare
from common.errors import ConfigError, FederationError
from common.files import write_atomic
from common.models.base import model_digest, resolve_base
from common.processes import end, last_lines, python_module, spawn
from server.results import save, tables
from server.runs import Run
from simulations.config import SimulationConfig
from simulations.federation import OnOneMachine
from simulations.live import Progress

JOINT, RESULT = "joint", "result.json"


def run_simulation(config: SimulationConfig, out: Path, *, fresh: bool = False) -> Path:
    """Run (or resume) `config` in `out`; returns the report's path. Raises IsthmusError."""
    started_s = time.time()
    _claim(config, out, fresh=fresh)
    console = Console(stderr=True)
    console.print(f"simulation {config.run.name} in {out}: {len(config.domain)} domains", highlight=False)
    data = {source.name: prepare_source(config, source.name, out) for source in config.domain}
    setup_s = time.time() - started_s

    machine = OnOneMachine(
        out,
        data,
        policy=config.policy,
        **config.simulation.model_dump(include={"threads_per_domain", "trainers_at_once"}),
    )
    statuses = {name: machine.client_path(name) / "work" / "status.json" for name in data}
    progress = Progress(statuses, console)
    with progress.shown(), machine.running(config.base.model) as supervisor:
        run = machine.start_run(config.run_config())
        progress.watch("server", run.folder / "status.json")
        machine.watch(run, supervisor, progress)

    extra_s = {"setup": round(setup_s, 2)}
    joint: dict[str, dict[str, float]] = {}
    if config.simulation.joint and config.lora is None:  # the reference trains encoders
        joint_started_s = time.time()
        joint = run_joint(out, console)
        extra_s["joint"] = round(time.time() - joint_started_s, 2)
    extra_s["total"] = round(time.time() - started_s, 2)
    summary = collect(machine, run, joint, extra_s)
    save(out, summary, _events(machine, run, data))
    _copy_results(machine, run, out, data)
    show(summary)
    report = out / "report.html"
    Console().print(f"report: {report}", highlight=False, soft_wrap=True)
    return report


def run_joint(out: Path, console: Console) -> dict[str, dict[str, float]]:
    """The joint reference of the simulation in `out`, in a process of its own; domain -> metric -> value."""
    console.print("joint reference on the pooled data: not private, simulation only", highlight=False)
    folder = out.resolve() / JOINT
    process = spawn(
        python_module("simulations.pooled", str(out.resolve())),
        folder=folder,
        log=folder / "joint.log",
        env={"MALLOC_ARENA_MAX": "1"},
    )
    progress = Progress({JOINT: folder / "status.json"}, console)
    try:
        with progress.shown():
            while process.poll() is None:
                progress()
                time.sleep(0.5)
    finally:
        end(process)
    if process.returncode:
        raise FederationError(
            f"the joint reference failed: {last_lines(folder / 'joint.log')}",
            next_step="start again to go on, or set simulation.joint = false",
        )
    return {name: dict(row) for name, row in _read_json(folder / RESULT).items()}


def prepare_source(config: SimulationConfig, name: str, out: Path) -> Path:
    """The prepared folder of one domain, made unless it is there."""
    source = next(source for source in config.domain if source.name == name)
    folder = out / "data" / name
    if (folder / "domain.json").exists():
        return folder
    path = Path(source.path)
    if (path / "domain.json").exists():
        domain = Domain.load(path)
        if source.users is not None:
            domain = domain.subsample(source.users, config.run.seed)
        domain.save(folder)
        return folder
    prepare(
        path,
        folder,
        name,
        Settings(k_core=source.k_core, public=source.public),
        format_name=source.format or None,
        users=source.users,
        seed=config.run.seed,
        replace_existing=True,
    )
    return folder


def collect(
    machine: OnOneMachine, run: Run, joint: dict[str, dict[str, float]], extra_s: dict[str, float]
) -> dict[str, Any]:
    """The server's summary with what only a simulation may add."""
    summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    if joint:
        summary.update(tables({**summary["results"], JOINT: joint}))
    summary["seconds"].update(extra_s)
    summary["domain_seconds"] = {
        name: _read_json(machine.client_path(name) / "seconds.json") for name in summary["domains"]
    }
    processes = _read_json(machine.folder / "server" / "processes.json")
    table = {f"server/{name}": usage for name, usage in processes.items()}
    for name in summary["domains"]:
        usages = _read_json(machine.client_path(name) / "processes.json")
        table.update({f"{name}/{process}": usage for process, usage in usages.items()})
    summary["processes"] = table
    return summary


def show(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the table of results: NDCG@k of every row and domain, and the normalised average."""
    console = console or Console()
    k = summary["config"]["evaluation"]["k"]
    metric, recall = f"ndcg@{k}", f"recall@{k}"
    domains = list(summary["domains"])
    title = f"NDCG@{k}" + (" on synthetic data" if summary["synthetic"] else "")
    table = Table(title=title, box=None, title_justify="left")
    table.add_column("", no_wrap=True)  # a narrow terminal folds the headings, never the names of the rows
    for heading in (*domains, "mean", "mean of 100", f"R@{k} of 100"):
        table.add_column(heading)
    for row, by_domain in summary["results"].items():
        cells = [_number(by_domain.get(name, {}).get(metric), 4) for name in domains]
        average = summary["average"][row]
        cells += [
            _number(average["results"].get(metric), 4),
            _number(average["normalised"].get(metric), 1),
            _number(average["normalised"].get(recall), 1),
        ]
        table.add_row(row + (" (not private)" if row == JOINT else ""), *cells)
    console.print(table)
    console.print(
        "100 = each domain's own fine-tuned model; bytes that crossed: " + _crossed(summary), highlight=False
    )


def _crossed(summary: dict[str, Any]) -> str:
    total = {"in": 0, "out": 0}
    for directions in summary["crossings"].values():
        for direction, kinds in directions.items():
            total[direction] += sum(cell["bytes"] for cell in kinds.values())
    return f"{total['in'] / 1e6:.1f} MB to the server, {total['out'] / 1e6:.1f} MB back"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _claim(config: SimulationConfig, out: Path, *, fresh: bool) -> None:
    """Make `out` ours, or resume it. Raises ConfigError when it holds something else."""
    if fresh and out.exists():
        if any(out.iterdir()) and not (out / "config.json").exists():
            raise ConfigError(f"{out} is not a simulation's folder", next_step="choose another --out")
        shutil.rmtree(out)
    resolved = json.dumps(
        {**config.model_dump(mode="json"), "base_digest": model_digest(resolve_base(config.base.model))}
    )
    known = out / "config.json"
    if known.exists():
        if json.loads(known.read_text(encoding="utf-8")) != json.loads(resolved):
            raise ConfigError(
                f"{out} holds a run of another configuration", next_step="another --out, or --fresh"
            )
        if (out / "summary.json").exists():
            raise ConfigError(f"{out} holds a finished run", next_step="another --out, or --fresh")
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", next_step="choose another --out")
    write_atomic(known, resolved.encode())


def _events(machine: OnOneMachine, run: Run, domains: Iterable[str]) -> list[dict[str, Any]]:
    """The server's events but for results (those are written anew), and every domain's training curve."""
    events = [event for event in _lines(run.folder / "metrics.jsonl") if event["type"] != "result"]
    for name in domains:
        for path in sorted(machine.client_path(name).glob("work/fits/*/metrics.jsonl")):
            events += [{"type": "training", "domain": name, **event} for event in _lines(path)]
    return events


def _copy_results(machine: OnOneMachine, run: Run, out: Path, domains: Iterable[str]) -> None:
    """The published model and both shores' ledgers, where a reader looks first."""
    shutil.copytree(run.folder / "model", out / "model", dirs_exist_ok=True)
    ledgers = out / "ledgers"
    ledgers.mkdir(exist_ok=True)
    shutil.copyfile(machine.server_home.path / "ledger.jsonl", ledgers / "server.jsonl")
    for name in domains:
        shutil.copyfile(machine.client_path(name) / "ledger.jsonl", ledgers / f"{name}.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
