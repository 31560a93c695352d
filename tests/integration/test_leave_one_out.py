"""What a finished run says of its vectors, one of them noise: norms, cosines, the merge without each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from localgrid import KilledError, LocalFederation, pico_run_config
from safetensors.torch import load_file
from typer.testing import CliRunner

from clients.training.job import Job
from common.errors import FederationError
from common.vectors import write_vector
from server import leave_one_out as module
from server import rounds
from server.cli import create_run, run_app
from server.federation import Control
from server.leave_one_out import leave_one_out
from server.merge import run_merge
from server.rounds import execute
from server.runs import Run

DOMAINS = ("books", "garden", "toys")
BAD, HONEST = "garden", ("books", "toys")


class OneSendsNoise(LocalFederation):
    """Domain `BAD` sends random numbers in place of its vector, of a hundred times its size."""

    def _run_job(self, job: Job) -> dict[str, Any]:
        result = super()._run_job(job)
        if Path(job.domain).name == BAD and job.mode == "fit":
            path, generator = Path(result["vector_path"]), torch.Generator().manual_seed(5)
            noise = {
                name: torch.randn(tensor.shape, generator=generator) * 100 * tensor.float().std()
                for name, tensor in load_file(path).items()
            }
            noisy = path.with_name("noisy.safetensors")
            write_vector(noisy, noise, job.config.training.vector_codec)
            result["vector_path"] = str(noisy)
        return result


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, pico_model: Path, make_domain: Callable[..., Any]
) -> Iterator[LocalFederation]:
    folder = tmp_path_factory.mktemp("noise")
    with OneSendsNoise(folder, pico_model, make_domain, DOMAINS) as federation:
        yield federation


@pytest.fixture(scope="module")
def done(federation: LocalFederation) -> Run:
    config = pico_run_config(federation.base, max_norm=1000.0)  # the noise is to be let in
    changes = {
        "merge": tuple(method for method in config.merge if method.method == "task-arithmetic"),
        "publish": "task-arithmetic",
        "training": config.training.model_copy(update={"max_steps": 12, "eval_every_steps": 6}),
        "learning": config.learning.model_copy(update={"holdout": 0.5}),
    }
    run = create_run(federation.server(), config.model_copy(update=changes))
    with mock.patch.object(rounds, "Control", partial(Control, sleep_s=0.0)):
        execute(federation.grid(), federation.server(), run)
    return run


def test_norms_and_cosines_are_in_the_results_and_shown(federation: LocalFederation, done: Run) -> None:
    summary = json.loads((done.folder / "summary.json").read_text())
    found = summary["vectors"]["vectors"]
    assert set(found) == set(DOMAINS)
    assert found[BAD]["norm"] > 2 * max(found[name]["norm"] for name in HONEST)
    assert abs(found[BAD]["cosine_to_others"]) < 0.2
    assert all(facts["stands_out"] == [] for facts in found.values())  # three are too few to say so
    page = (done.folder / "report.html").read_text()
    assert "no clean bill" in page
    said = CliRunner().invoke(run_app, ["vectors", "--home", str(federation.server_path)])
    assert said.exit_code == 0, said.output
    assert BAD in said.output and "no clean bill" in " ".join(said.output.split())
    whole = CliRunner().invoke(run_app, ["vectors", "--json", "--home", str(federation.server_path)])
    assert json.loads(whole.output) == summary["vectors"]


def test_the_others_are_better_off_without_the_noise_and_a_killed_evaluation_goes_on(
    federation: LocalFederation, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        found = run_merge(*arguments, **options)
        merged.append(0 if found.resumed else 1)
        if len(merged) == 3:
            raise KilledError
        return found

    monkeypatch.setattr(module, "run_merge", counted)
    with pytest.raises(KilledError):
        leave_one_out(federation.server(), done)
    said = CliRunner().invoke(run_app, ["leave-one-out", "--home", str(federation.server_path)])
    assert said.exit_code == 0, said.output
    assert sum(merged) == len(DOMAINS)  # each once: the merge of all was made by the run
    assert "This does not show that a model has no backdoor" in " ".join(said.output.split())

    found = json.loads((done.folder / "summary.json").read_text())["leave_one_out"]
    assert set(found["without"]) == set(found["probes"]) == set(DOMAINS)
    for honest in HONEST:
        gain = found["without"][BAD]["change"][honest]
        assert gain > 0.02
        assert all(gain > found["without"][other]["change"][honest] for other in HONEST)
    for row in found["without"].values():
        assert all(0 <= value < 1 for value in row["agreement"].values())
    assert "backdoor" in (done.folder / "report.html").read_text()

    count = len(merged)
    assert leave_one_out(federation.server(), done) == found
    assert len(merged) == count  # nothing is left to do


def test_only_a_finished_run_is_evaluated(federation: LocalFederation) -> None:
    run = federation.run()
    with pytest.raises(FederationError, match="not a finished run"):
        leave_one_out(federation.server(), run)
