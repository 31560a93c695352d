"""Merges by several processes: the same files as by one, and nothing left behind when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tiny_models import moved, random_tensors, write_model

from common.errors import IsthmusError, VectorError
from server.engine import passes, run, stream, writing
from server.engine.forks import in_processes
from server.engine.recipe import ModelEntry, Recipe
from server.engine.run import merge_folders
from server.merging import methods
from server.merging._vectors import BLOCK_VALUES

SHAPES: dict[str, tuple[int, ...]] = {
    "a": (3, BLOCK_VALUES),
    "b": (5,),
    "c": (2 * BLOCK_VALUES + 1,),
    "d": (0,),
}
LABELS = ("beauty", "toys", "games")
BY_BLOCKS = [name for name, method in methods().items() if method.unit in ("block", "rows")]


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A base and three models of seven blocks, which are enough for as many workers."""
    monkeypatch.setattr(stream, "BLOCKS_A_WORKER", 1)
    base = random_tensors(0, SHAPES)
    models = {label: moved(base, seed) for seed, label in enumerate(LABELS, start=1)}
    return {name: write_model(tmp_path / name, tensors) for name, tensors in {"base": base, **models}.items()}


def of(family: dict[str, Path], out: Path, method: str, **more: Any) -> Recipe:
    models = tuple(ModelEntry(path, label) for label, path in family.items() if label != "base")
    return Recipe(models=models, method=method, out=out, base=family["base"], **more)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.parametrize("method", [*BY_BLOCKS, "iso-c"])
@pytest.mark.parametrize("checkpoint_bytes", [1, 1 << 30])
def test_workers_write_what_one_process_writes(
    family: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    checkpoint_bytes: int,
) -> None:
    monkeypatch.setattr(passes, "CHECKPOINT_BYTES", checkpoint_bytes)
    records = {n: merge_folders(of(family, tmp_path / f"by-{n}", method), workers=n) for n in (1, 2, 3, 8)}
    name = "model.safetensors"
    for workers, record in records.items():
        assert (tmp_path / f"by-{workers}" / name).read_bytes() == (tmp_path / "by-1" / name).read_bytes()
        for counted in ("bytes_read", "bytes_written", "warnings"):
            assert record[counted] == records[1][counted]
    assert not children()


@pytest.mark.parametrize("method", ["ties", "localize-and-stitch", "pcb"])
def test_a_sample_spares_a_pass_and_changes_nothing(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole = merge_folders(of(family, tmp_path / "whole", method))
    monkeypatch.setattr(stream, "MIN_SAMPLE", 4096)
    monkeypatch.setattr(stream, "RUN_VALUES", 64)
    for workers in (1, 2):
        sampled = merge_folders(of(family, tmp_path / f"sampled-{workers}", method), workers=workers)
        assert sampled["bytes_read"] < whole["bytes_read"]
        name = "model.safetensors"
        assert (tmp_path / f"sampled-{workers}" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_workers_really_share_the_work() -> None:
    assert len(set(in_processes([os.getpid] * 3))) == 3


def test_what_lies_in_another_workers_share_is_noticed(family: dict[str, Path], tmp_path: Path) -> None:
    base = random_tensors(0, SHAPES)
    changed = moved(base, 1)
    write_model(family["toys"], changed)  # as beauty
    write_model(family["games"], base)
    record = merge_folders(of(family, tmp_path / "out", "weight-averaging"), workers=4)
    assert record["warnings"] == [
        "toys and beauty have the same weights; they count twice",
        "games equals the base: its task vector is zero and counts as one",
    ]
    changed["c"][-1] += 1  # the last block alone differs
    write_model(family["toys"], changed)
    record = merge_folders(of(family, tmp_path / "again", "weight-averaging"), workers=4)
    assert [warning.split()[0] for warning in record["warnings"]] == ["games"]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"lambda": 0.0}])
@pytest.mark.parametrize("whose", ["toys", "base"])
def test_a_value_outside_the_sample_is_seen_in_the_sum(
    family: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    value: float,
    options: dict[str, float],
    whose: str,
) -> None:
    monkeypatch.setattr(stream, "SAMPLED_BLOCKS", 1)  # so of seven blocks the first alone
    broken = random_tensors(0, SHAPES)
    if whose != "base":
        broken = moved(broken, 2)
    broken["c"][-1] = value
    write_model(family[whose], broken)
    recipe = of(family, tmp_path / "out", "task-arithmetic", options=options)
    with pytest.raises(VectorError, match=rf"{whose}.*tensor 'c' holds NaN"):
        merge_folders(recipe, workers=workers)


def test_a_model_of_another_base_is_told_by_a_sample(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SAMPLED_BLOCKS", 2)
    write_model(family["toys"], random_tensors(9, SHAPES))
    records = [merge_folders(of(family, tmp_path / f"by-{n}", "weight-averaging"), workers=n) for n in (1, 4)]
    assert records[0]["warnings"] == records[1]["warnings"]
    assert [warning.split("%")[0] for warning in records[0]["warnings"]] == ["toys lies 142"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone is asked")
def test_a_large_result_is_sent_to_the_disk_while_it_is_written(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    advise = os.posix_fadvise

    def spy(file: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        sent.append((start, start + size))
        advise(file, start, size, advice)

    merge_folders(of(family, tmp_path / "small", "weight-averaging"))
    monkeypatch.setattr(os, "posix_fadvise", spy)
    monkeypatch.setattr(run, "CHECKPOINT_BYTES", 1)
    monkeypatch.setattr(writing, "WRITE_BACK_BYTES", 2 * 4 * BLOCK_VALUES)
    merge_folders(of(family, tmp_path / "large", "weight-averaging"))
    name = "model.safetensors"
    assert (tmp_path / "large" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    assert len(sent) == 2  # of five blocks and some bytes
    assert sent[0][1] == sent[1][0]  # nothing is left out between
    assert all(end - start >= 2 * 4 * BLOCK_VALUES for start, end in sent)


def test_a_workers_error_names_the_tensor_and_leaves_nothing(family: dict[str, Path], tmp_path: Path) -> None:
    broken = moved(random_tensors(0, SHAPES), 2)
    broken["c"][-1] = np.nan
    write_model(family["toys"], broken)
    with pytest.raises(VectorError, match=r"toys.*tensor 'c' holds NaN") as caught:
        merge_folders(of(family, tmp_path / "out", "dare"), workers=3)
    assert caught.value.next_step
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
    assert not children()


def test_a_killed_worker_is_an_error() -> None:
    def die() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(IsthmusError, match="exit code -9") as caught:
        in_processes([os.getpid, die, os.getpid])
    assert "fewer workers" in caught.value.next_step
    assert not children()


def test_an_interrupt_ends_the_workers() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    def long() -> int:
        time.sleep(600)
        return 0

    with pytest.raises(KeyboardInterrupt):
        in_processes([interrupted, long])
    assert not children()


KILLED = """
import os, signal, sys, time
from pathlib import Path
import psutil
from server.engine import passes, run, stream
from server.engine.recipe import read_recipe
stream.BLOCKS_A_WORKER = passes.CHECKPOINT_BYTES = 1
parent, add = os.getpid(), passes.WeightWriter.add
def slow(self, name, *rest):
    add(self, name, *rest)
    if name == "c" and os.getpid() != parent:
        time.sleep(600)
passes.WeightWriter.add = slow
def report(*, phase, step=0, **_):
    if step == 5:  # the first block of "c", the rest of which is another's
        print([child.pid for child in psutil.Process().children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
run.merge_folders(read_recipe(Path(sys.argv[1])), workers=2, report=report)
"""


def test_workers_end_with_a_killed_merge_which_goes_on(family: dict[str, Path], tmp_path: Path) -> None:
    models = "".join(f'[[model]]\npath = "{label}"\n' for label in LABELS)
    (tmp_path / "recipe.toml").write_text(f'base = "base"\nmethod = "ties"\nout = "out"\n{models}')
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.toml")]
    died = subprocess.run(command, timeout=250, stdout=subprocess.PIPE, check=False)
    assert died.returncode == -signal.SIGKILL
    (worker,) = json.loads(died.stdout)
    until_s = time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until_s
        time.sleep(0.05)
    assert merge_folders(of(family, tmp_path / "out", "ties"), workers=2)["resumed_tensors"] > 0
    merge_folders(of(family, tmp_path / "whole", "ties"))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_freed_memory_is_kept() -> None:
    """Memory that is taken again costs no new pages."""
    code = (
        "import resource, numpy as np\n"
        "from server.engine.heap import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "def work(): [np.ones(1 << 20, np.uint8) for _ in range(4)]\n"
        "work()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(50): work()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 5_000  # of 51,200 that are touched
