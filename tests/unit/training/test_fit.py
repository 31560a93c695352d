"""Fine-tuning: what it writes, what it never touches, and that kills and clocks do not change the result."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.training import isolation
from clients.training.checkpoint import newest_checkpoint
from clients.training.evaluate import evaluate
from clients.training.fit import FitResult, check_frozen, fine_tune, fit_folder, load_encoder
from clients.training.job import Job, run_job
from clients.training.loss import TwoTower
from common.config import PrivacySection, RunConfig
from common.errors import DataError, FederationError, ModelError
from common.models.base import load_tensors, trainable_tensors
from common.models.encoder import Encoder
from common.vectors import apply, read_vector


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def changed(config: RunConfig, **training: Any) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def reference(pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path) -> FitResult:
    return fine_tune(pico_domain, pico_model, pico_config, tmp_path / "reference")


def test_the_vector_is_what_training_changed_and_nothing_else(
    reference: FitResult, pico_model: Path, pico_config: RunConfig
) -> None:
    base = load_tensors(pico_model)
    tau = read_vector(reference.vector_path, trainable_tensors(pico_model), "fp32")
    model = load_tensors(reference.model_folder)
    assert same(model, apply(base, tau))
    for name in set(base) - set(tau):
        assert torch.equal(model[name], base[name]), name
    assert all(bool(tensor.any()) for name, tensor in tau.items() if "key.bias" not in name)
    assert reference.steps == 12 and reference.best_step in (4, 8, 12) and not reference.resumed


def test_padding_is_left_out_where_users_need_not_be_told_apart(
    pico_model: Path, pico_config: RunConfig
) -> None:
    long = pico_config.model_copy(update={"text": pico_config.text.model_copy(update={"max_seq_len": 257})})
    private = pico_config.model_copy(update={"privacy": PrivacySection(mechanism="dp-sgd", epsilon=8.0)})
    assert load_encoder(pico_model, pico_config, device="cpu").is_packed
    assert not load_encoder(pico_model, pico_config, device="cpu", training=False).is_packed
    for config in (long, private):
        assert not load_encoder(pico_model, config, device="cpu").is_packed


def test_training_learns(pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path) -> None:
    config = changed(
        pico_config,
        max_steps=80,
        eval_every_steps=40,
        checkpoint_every_steps=80,
        dropout=0.0,
        history_negatives=0,
    )
    result = fine_tune(pico_domain, pico_model, config, tmp_path)
    lines = [
        json.loads(line) for line in (result.vector_path.parent / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    rates = [line["next_learning_rate"] for line in lines if "loss" in line]
    assert rates[0] == 1e-3 and rates[-1] == 0.0 and rates == sorted(rates, reverse=True)
    zero_shot = evaluate(Encoder.load(pico_model), pico_domain, config, "valid").metrics["ndcg@10"]
    assert result.validation_ndcg > 2 * zero_shot


def test_the_log_holds_numbers_alone(reference: FitResult) -> None:
    for line in (reference.vector_path.parent / "metrics.jsonl").read_text().splitlines():
        assert all(isinstance(value, int | float) for value in json.loads(line).values())
    names = {path.name for path in reference.vector_path.parent.iterdir()}
    assert names == {"vector.safetensors", "model", "result.json", "metrics.jsonl", "clock.json"}


def test_calling_again_trains_nothing(
    reference: FitResult, pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("it works again")

    assert fine_tune(pico_domain, pico_model, pico_config, tmp_path / "reference", refuse) == reference
    reference.vector_path.write_bytes(b"something else")
    with pytest.raises(ModelError, match="journaled"):
        fine_tune(pico_domain, pico_model, pico_config, tmp_path / "reference")


def test_of_two_at_once_one_waits_and_trains_nothing(
    pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    training, waiting = threading.Event(), threading.Event()
    phases: list[str] = []

    def trains(*, phase: str, **_: Any) -> None:
        if phase == "train" and not training.is_set():
            training.set()
            assert waiting.wait(60)

    def waits(*, phase: str, **_: Any) -> None:
        phases.append(phase)
        if phase.startswith("wait"):
            waiting.set()

    with ThreadPoolExecutor() as pool:
        first = pool.submit(fine_tune, pico_domain, pico_model, pico_config, tmp_path, trains)
        assert training.wait(60)
        second = pool.submit(fine_tune, pico_domain, pico_model, pico_config, tmp_path, waits)
        assert second.result(120) == first.result(120)
    assert phases == ["prepare", "wait for another process"]


def test_the_folder_depends_on_configuration_base_and_data(
    pico_domain: Any, pico_model: Path, pico_sentence_model: Path, pico_config: RunConfig, tmp_path: Path,
    make_domain: Callable[..., Any],
) -> None:  # fmt: skip
    folders = {
        fit_folder(pico_domain, pico_model, pico_config, tmp_path),
        fit_folder(pico_domain, pico_model, changed(pico_config, learning_rate=1e-4), tmp_path),
        fit_folder(pico_domain, pico_sentence_model, pico_config, tmp_path),
        fit_folder(make_domain(seed=5), pico_model, pico_config, tmp_path),
    }
    assert len(folders) == 4


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("at", [("train", 2), ("train", 7), ("validate", 8), ("train", 12), ("write", 12)])
def test_interrupted_training_ends_with_the_same_tensors(
    reference: FitResult, pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path,
    at: tuple[str, int],
) -> None:  # fmt: skip
    reached = 0

    def kill(*, phase: str, step: int = 0, **_: Any) -> None:
        nonlocal reached
        reached = step if phase == "train" else reached
        if phase == at[0] and reached == at[1]:
            raise KilledError

    with pytest.raises(KilledError):
        fine_tune(pico_domain, pico_model, pico_config, tmp_path / "work", kill)
    torch.manual_seed(99)  # whatever the random state of the new process is
    result = fine_tune(pico_domain, pico_model, pico_config, tmp_path / "work")
    assert result.resumed == (at[1] > 3)
    assert result.vector_sha256 == reference.vector_sha256
    assert (result.steps, result.best_step) == (reference.steps, reference.best_step)
    log = (result.vector_path.parent / "metrics.jsonl").read_text()
    assert log == (reference.vector_path.parent / "metrics.jsonl").read_text()


def test_early_stopping_waits_for_patience(
    pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    config = changed(pico_config, max_steps=200, eval_every_steps=1, patience=3, learning_rate=1e-9)
    result = fine_tune(pico_domain, pico_model, config, tmp_path)
    assert (result.best_step, result.steps) == (1, 4)  # nothing moves, so the first stays the best


def test_the_clock_ends_training_with_a_valid_vector(
    pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    config = changed(pico_config, max_steps=100_000, eval_every_steps=100_000, max_minutes=0.01)
    started_s = time.monotonic()
    result = fine_tune(pico_domain, pico_model, config, tmp_path)
    assert time.monotonic() - started_s < 10
    assert 1 <= result.best_step == result.steps < 100_000
    assert read_vector(result.vector_path, trainable_tensors(pico_model))


def test_the_clock_counts_what_was_spent_before_a_kill(
    pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    config = changed(pico_config, max_steps=100_000, eval_every_steps=100_000, max_minutes=0.5)
    folder = fit_folder(pico_domain, pico_model, config, tmp_path)
    folder.mkdir(parents=True)
    (folder / "clock.json").write_text('{"elapsed_s": 29.99}')
    result = fine_tune(pico_domain, pico_model, config, tmp_path)
    assert result.steps <= 3 and result.seconds >= 29.99


def test_a_loss_that_is_not_finite_is_named(
    pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    config = changed(pico_config, learning_rate=1e30, max_steps=50, eval_every_steps=50)
    with pytest.raises(ModelError, match="not finite at step"):
        fine_tune(pico_domain, pico_model, config, tmp_path)


def test_a_frozen_tensor_that_moved_is_noticed(pico_model: Path) -> None:
    encoder = Encoder.load(pico_model)
    tower = TwoTower(encoder, set(trainable_tensors(pico_model)), 0.05)
    check_frozen(tower, pico_model)
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight[7, 3] += 1e-3  # type: ignore[operator]
    with pytest.raises(ModelError, match="word_embeddings"):
        check_frozen(tower, pico_model)


def test_bf16_and_no_dropout_and_last_positions(
    pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    config = changed(
        pico_config,
        precision="bf16",
        vector_codec="bf16",
        dropout=0.0,
        positions_per_user="last",
        max_steps=4,
    )
    result = fine_tune(pico_domain, pico_model, config, tmp_path)
    tau = read_vector(result.vector_path, trainable_tensors(pico_model), "bf16")
    assert same(load_tensors(result.model_folder), apply(load_tensors(pico_model), tau))


# --- in a process of its own ------------------------------------------------------------------------


@pytest.fixture
def job(pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path) -> Job:
    pico_domain.save(tmp_path / "domain")
    (tmp_path / "work").mkdir()
    config = changed(pico_config, max_steps=60, eval_every_steps=20, dropout=0.1)
    return Job(
        mode="fit", domain=str(tmp_path / "domain"), base=str(pico_model), work=str(tmp_path / "work"),
        status=str(tmp_path / "work" / "status.json"), config=config, threads=1, home=str(tmp_path),
    )  # fmt: skip


def test_a_killed_process_goes_on_and_ends_the_same(
    job: Job, pico_domain: Any, pico_model: Path, tmp_path: Path
) -> None:
    folder = fit_folder(pico_domain, pico_model, job.config, Path(job.work))

    def kill_soon(process: Any) -> None:
        def watch() -> None:
            while process.poll() is None:
                checkpoint = newest_checkpoint(folder)
                if checkpoint is not None and int(checkpoint.name.split("-")[1]) >= 12:
                    process.kill()
                    return
                time.sleep(0.005)

        threading.Thread(target=watch).start()

    with pytest.raises(FederationError, match="killed by signal 9"):
        run_job(job, on_start=kill_soon)
    result = run_job(job)
    assert result["resumed"]
    assert result["isolated"] == isolation.possible()
    uninterrupted = fine_tune(pico_domain, pico_model, job.config, tmp_path / "reference")
    assert result["vector_sha256"] == uninterrupted.vector_sha256
    assert set(result["evaluations"]) == {"zero-shot", "fine-tuned"}
    assert result["peak_memory_bytes"] > 1e7
    for label in ("zero-shot", "fine-tuned"):
        assert (tmp_path / "work" / "per_user" / f"{label}.parquet").is_file()
    status = json.loads((tmp_path / "work" / "status.json").read_text())
    assert status["phase"].startswith("evaluate") and status["step"] == status["total"]
    log = (tmp_path / "work" / "trainer.log").read_text()
    assert "title" not in log and "u0" not in log


def test_a_trainer_names_its_error(job: Job, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "domain")
    with pytest.raises(DataError, match=r"domain\.json is missing"):
        run_job(job)
    record = json.loads(job.file("error").read_text())
    assert record["code"] == "data" and record["next_step"]


def test_a_job_is_checked() -> None:
    with pytest.raises(ValueError, match="label"):
        Job(mode="evaluate", domain="d", base="b", work="w", config=RunConfig())
