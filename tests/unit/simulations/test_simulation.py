"""Simulations: their configuration, the live progress, and what is done before and after the processes."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from clients.data.domain import Domain
from common.config import RunConfig
from common.errors import ConfigError
from common.progress import StatusFile
from server.cli import create_home
from server.members import Member
from server.results import tables
from simulations import live, simulate
from simulations.config import DomainSource, SimulationConfig, load_simulation
from simulations.federation import OnOneMachine

TWO = """
[[domain]]
name = 'toys'
path = 'data/toys'
[[domain]]
name = 'books'
path = '/abs/books'
users = 9
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "sim.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load_simulation(written(tmp_path, TWO))
    assert [source.path for source in config.domain] == [str(tmp_path / "data" / "toys"), "/abs/books"]
    assert config.domain[1].users == 9


def test_a_deployment_would_be_given_the_run_alone(tmp_path: Path) -> None:
    config = load_simulation(written(tmp_path, "publish = 'ties'\n[simulation]\njoint = false\n" + TWO))
    run = config.run_config()
    assert type(run) is RunConfig
    assert run.publish == "ties"
    assert "domain" not in run.model_dump()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TWO.replace("books", "toys"), "two domains are called 'toys'"),
        (TWO.partition("[[domain]]\nname = 'books'")[0], "1 [[domain]] entries"),
        ("", "0 [[domain]] entries"),
        (TWO.replace("'toys'", "'Not A Name'", 1), "domain.0.name"),
        (TWO.replace("users = 9", "users = 0"), "domain.1.users"),
    ],
)
def test_what_is_no_simulation(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_simulation(written(tmp_path, text))
    assert says in caught.value.message


# Live progress


def drawn(statuses: dict[str, Path], *, terminal: bool) -> tuple[live.Progress, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100)
    return live.Progress(statuses, console), output


def test_without_a_terminal_a_line_for_each_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    progress, output = drawn({"toys": tmp_path / "toys.json"}, terminal=False)
    with progress.shown():
        progress()
        report = StatusFile(tmp_path / "toys.json")
        report(phase="train", step=1, total=4, loss=0.5)
        for _ in range(3):
            progress()
        now_s[0] += live.LINE_EVERY_S + 1
        progress()
        report(phase="send task-vector", step=4, total=4, bytes_sent=2_500_000)
        progress()
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["toys", "phase", "train", "step", "1/4", "loss", "0.500"]
    assert lines[2].split()[1:] == ["phase", "send", "task-vector", "step", "4/4", "sent", "2", "MB"]


def test_on_a_terminal_a_table_that_redraws(tmp_path: Path) -> None:
    progress, output = drawn({"toys": tmp_path / "toys.json"}, terminal=True)
    with progress.shown():
        progress.watch("server", tmp_path / "server.json")
        StatusFile(tmp_path / "server.json")(phase="merge ties", step=1, total=2)
        progress()
    assert "waiting" in output.getvalue()
    assert "merge ties" in output.getvalue()


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5 B"), (1600, "2 KB"), (3_200_000, "3 MB"), (7_100_000_000, "7.1 GB")]
)
def test_bytes(count: int, text: str) -> None:
    assert live._bytes(count) == text


# Before and after the processes


def config_for(base: Path, **sections: Any) -> SimulationConfig:
    sources = [DomainSource(name=name, path="x").model_dump() for name in ("toys", "books")]
    return SimulationConfig.model_validate({"base": {"model": str(base)}, "domain": sources, **sections})


def test_a_folder_belongs_to_one_configuration(tmp_path: Path, pico_model: Path) -> None:
    out, config = tmp_path / "out", config_for(pico_model)
    simulate._claim(config, out, fresh=False)
    simulate._claim(config, out, fresh=False)  # resumed
    other = config_for(pico_model, run={"seed": 7})
    with pytest.raises(ConfigError, match="another configuration"):
        simulate._claim(other, out, fresh=False)
    (out / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="a finished run"):
        simulate._claim(config, out, fresh=False)
    simulate._claim(other, out, fresh=True)
    assert not (out / "summary.json").exists()


def test_a_run_that_is_open_goes_on(tmp_path: Path, pico_model: Path) -> None:
    hosts = {"name": "pico", "hosts": ["127.0.0.1"], "bind": "127.0.0.1"}
    ports = {"fleet": 9000, "exchange": 9001, "enrol": 9002, "superlink": 9003}
    home = create_home(tmp_path / "server", {**hosts, "ports": ports})
    home.members.put(Member("toys", "domain-1", "1" * 64, "2" * 64, "PEM", "f" * 64, "12", 5))
    machine, config = OnOneMachine(tmp_path, {}), config_for(pico_model).run_config()
    run = machine.start_run(config)
    assert machine.start_run(config).spec == run.spec
    run.set_state("done")
    assert machine.start_run(config).spec.run_id != run.spec.run_id


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, pico_model: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(ConfigError):
            simulate._claim(config_for(pico_model), tmp_path, fresh=fresh)
    assert (tmp_path / "thesis.tex").exists()


def test_a_prepared_domain_is_taken_as_it_is_or_sampled(
    tmp_path: Path, pico_model: Path, pico_domain: Domain
) -> None:
    pico_domain.save(tmp_path / "source")
    path = str(tmp_path / "source")
    sources = [{"name": "toys", "path": path}, {"name": "few", "path": path, "users": 10}]
    config = config_for(pico_model, domain=sources)
    whole = Domain.load(simulate.prepare_source(config, "toys", tmp_path / "out"))
    few = Domain.load(simulate.prepare_source(config, "few", tmp_path / "out"))
    assert (len(whole.user_ids), len(few.user_ids)) == (40, 10)
    folder = tmp_path / "out" / "data" / "few"
    before = (folder / "sequences.parquet").stat().st_mtime_ns
    assert simulate.prepare_source(config, "few", tmp_path / "out") == folder
    assert (folder / "sequences.parquet").stat().st_mtime_ns == before


def test_the_table_says_what_is_not_private_and_what_crossed() -> None:
    results = {
        "fine-tuned": {"toys": {"ndcg@10": 0.2, "recall@10": 0.4}},
        "joint": {"toys": {"ndcg@10": 0.3, "recall@10": 0.6}},
    }
    cell = {"count": 1, "bytes": 1_500_000}
    summary = {
        "config": {"evaluation": {"k": 10}},
        "domains": {"toys": {}, "books": {}},
        "synthetic": True,
        "crossings": {"toys": {"in": {"task-vector": cell}, "out": {"candidate": cell, "message": cell}}},
        **tables(results),
    }
    output = io.StringIO()
    simulate.show(summary, Console(file=output, width=160))
    text = output.getvalue()
    assert "on synthetic data" in text
    assert "joint (not private)" in text
    assert "150.0" in text
    assert "1.5 MB to the server, 3.0 MB back" in text


def test_events_of_all_homes(tmp_path: Path) -> None:
    class Machine:
        def client_path(self, name: str) -> Path:
            return tmp_path / name

    (tmp_path / "run").mkdir()
    lines = [{"type": "phase", "phase": "merge"}, {"type": "result", "row": "x"}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = tmp_path / "toys" / "work" / "fits" / "r1" / "metrics.jsonl"
    curve.parent.mkdir(parents=True)
    curve.write_text('{"step": 1, "loss": 2.0}\n')
    run = type("Run", (), {"folder": tmp_path / "run"})
    events = simulate._events(Machine(), run, ["toys", "books"])  # type: ignore[arg-type]
    assert events == [lines[0], {"type": "training", "domain": "toys", "step": 1, "loss": 2.0}]
