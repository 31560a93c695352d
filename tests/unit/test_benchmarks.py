"""The benchmarks run, at toy sizes: what they compare agrees, and every figure that they report is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import (
    candidates,
    data_channel,
    learned_step,
    learned_task,
    ledger,
    merge_command,
    model_folders,
    outliers,
    private_step,
    shared_prefix,
    training_step,
)
from benchmarks.measure import line, medians, take_turns
from common.language.pool import Candidate, Pool


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_medians_take_turns_and_leave_the_warm_up_out() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = take_turns(calls, 2)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}
    assert line([2, 4, 8], [7, 11, 19]) == pytest.approx((2, 3))


def test_learned_step(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    small = ["--n", "2", "--repeats", "1", "--baseline-repeats", "1", "--threads", "1", "--precision", "fp32"]
    learned_step.main([*small, "--out", str(out)])
    record = json.loads(out.read_text())
    assert [(check["granularity"], check["baseline"]) for check in record["checks"]] == [
        ("domain", "reference"), ("domain", "mended"), ("layer", "reference"), ("layer", "mended"),
    ]  # fmt: skip
    assert len(record["steps"]) == 2
    for step in record["steps"]:
        assert all(value > 0 for value in step["seconds"].values())
        assert all(value > 0 for value in step["processor"].values())
        assert all(value > 0 for value in [*step["ratios"].values(), *step["processor_ratios"].values()])


def test_the_check_of_the_baseline_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.reference_loop.ALPHA", 999.0)
    with pytest.raises(AssertionError, match="loss_off_by"):
        learned_step.check(tmp_path / "model")


def test_a_baseline_that_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_step, "_short_of_bytes", lambda *_: 1)
    options = learned_step.parse(["--repeats", "1"])
    model = learned_task.make_model("tiny", tmp_path / "model", "cpu", "fp32")
    row = learned_step.measure(model, "tiny", 2, "domain", options)
    assert row.seconds["reference"] is None
    assert row.ratios()["reference / ours"] is None
    assert row.ratios()["ours / (bare + read)"] is not None


def test_a_limit_of_memory_leaves_baselines_out(tmp_path: Path) -> None:
    model = learned_task.make_model("tiny", tmp_path / "model", "cpu", "fp32")
    for gib, fits in ((1e-9, False), (1e6, True)):
        options = learned_step.parse(["--memory-gib", str(gib)])
        assert (learned_step._short_of_bytes(model, 2, "domain", options) == 0) is fits


def test_bf16_vectors_come_in_turn_and_hold_what_fp32_ones_hold(tmp_path: Path) -> None:
    model = learned_task.make_model("tiny", tmp_path / "model", "cpu", "fp32")
    wide = learned_task.make_vectors(model, 3, torch.float32, distinct=2)
    narrow = learned_task.make_vectors(model, 3, torch.bfloat16, distinct=2)
    assert wide.taus[0] is wide.taus[2]
    assert not torch.equal(wide.flats[0], wide.flats[1])
    for one, other in zip(wide.flats, narrow.flats, strict=True):
        assert torch.equal(one, other.float())


def test_merge_command(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    merge_command.main(["--methods", "task-arithmetic", "--work", str(tmp_path), "--out", str(out)])
    record = json.loads(out.read_text())
    contenders = {row["contender"]: row for row in record["rows"]}
    assert set(contenders) == {"isthmus", "isthmus --no-digests", "start"}
    for row in contenders.values():
        assert row["s"] > 0
        assert 5 < row["peak MB"] < 200  # the process's own: no torch, and nothing of this one
    assert record["float64_error"] < 1e-6


def test_merge_command_against_n(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    given = ["--counts", "2,5", "--methods", "ties", "--work", str(tmp_path), "--out", str(out)]
    merge_command.main(given)
    record = json.loads(out.read_text())
    assert [(row["method"], row["N"]) for row in record["rows"]] == [("ties", 2), ("ties", 5)]
    assert all(row["peak MB"] > 5 and row["copy / it"] > 0 for row in record["rows"])
    assert [line["what"] for line in record["slopes"]] == ["processor s", "peak MB"]


def test_a_peer_that_writes_nothing_is_found_out(tmp_path: Path) -> None:
    folders = merge_command.make_folders(merge_command.parse([]), tmp_path)
    with pytest.raises(AssertionError, match="0 tensors of"):
        merge_command.check_task_arithmetic(["mkdir", str(tmp_path / "out")], folders, tmp_path / "out")


def test_merge_command_by_workers(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    merge_command.main(["--workers", "2", "--methods", "dare", "--work", str(tmp_path), "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["copies, s"] > 0
    assert row["one / several"] > 0


def test_merge_command_large(tmp_path: Path) -> None:
    base = model_folders.make_bert(tmp_path / "base", layers=3, hidden=32, shard_bytes=60_000)
    shards = model_folders.weight_files(base)
    index = json.loads((base / model_folders.INDEX).read_text())
    assert len(shards) > 1
    assert all(path.stat().st_size < 64_000 for path in shards)
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    models = [model_folders.make_copy(base, tmp_path / f"m{seed}", seed) for seed in range(2)]
    options = merge_command.parse(["--large", "--methods", "ties"])
    found = merge_command.large(options, merge_command.Folders(base, models, tmp_path))
    assert found["rows"][0]["peak_mb"] > 5
    assert found["model_bytes"] > 2 * found["shard_bytes"]


def test_data_channel(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    data_channel.main(["--mib", "1", "--repeats", "1", "--work", str(tmp_path), "--out", str(out)])
    record = json.loads(out.read_text())
    assert set(record["medians"]) == {"up", "down", "copy"}
    assert record["server_peak_bytes"] >= record["server_before_bytes"] > 0


def test_ledger(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    ledger.main(["--entries", "40", "--folder", str(tmp_path), "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["entries"] == 40
    assert set(record["proof_us"]) == {"make", "verify", "grown"}
    assert set(record["read_s"]) == {"open", "audit", "json.loads", "tree alone"}
    assert all(0 < share < 0.05 for share in record["run_share"].values())
    assert all(value > 0 for value in record["proof_us"].values())


def test_private_step(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    private_step.main(["--repeats", "1", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["off_by"] < 1e-4
    assert row["ours / opacus"] > 0 and row["ours / bare"] > 0


def test_training_step(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    training_step.main(["--batch-size", "4", "--steps", "1", "--precision", "fp32", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["off_by"] < training_step.TOLERANCE
    assert 0 < row["tokens / places"] < 1
    assert row["padded / ours"] > 0


def test_outliers(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    outliers.main(["--out", str(out)])
    rows = {row["changed"]: row for row in json.loads(out.read_text())["rows"]}
    assert (rows["as it is"]["hits"], rows["as it is"]["false_alarms"]) == (0, 0)
    assert rows["flipped"]["hits"] == rows["x 10"]["hits"] == rows["x 10"]["of"] == 5
    assert all(row["false_alarms"] == 0 for row in rows.values())


def test_shared_prefix(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    shared_prefix.main(["--title", "4", "--tokens", "20", "--repeats", "1", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["off by"] < 1e-3
    assert row["token ratio"] == pytest.approx(30 * 24 / (20 + 30 * 4), rel=0.15)
    assert all(row[f"{name}_s"] > 0 for name in ("whole", "shared", "eight", "prompt"))


def test_candidates_agree_and_are_measured(tmp_path: Path) -> None:
    adapters = candidates.adapters_of("toy", 3)
    for stage in candidates.candidates_of(3).values():
        mixed = Pool(adapters).mix(stage)
        for place in (0, 19):
            expected = candidates.naive(adapters, stage[place])
            assert expected.keys() == mixed[place].keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(mixed[place][name], tensor)
    one = {"d": adapters["d000"]}
    candidate = Candidate.of([0.5], [2.0])
    update = candidates.dense(one, candidate)["layers.0.0.lora_A.weight"]
    factors = candidates.naive(one, candidate)
    expected = factors["layers.0.0.lora_B.weight"] @ factors["layers.0.0.lora_A.weight"]
    torch.testing.assert_close(update, expected)
    candidates.main(["--counts", "2", "--repeats", "1", "--out", str(tmp_path / "record.json")])
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["ratios", "scales"]
    assert all(row["naive_ratio"] > 0 for row in rows)
