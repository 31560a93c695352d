"""Carrying out a job in this process: fine-tune, evaluate, write results. The other side of `job`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clients.data.domain import Domain
from clients.training.dataset import data_digest
from clients.training.evaluate import Evaluation, evaluate
from clients.training.fit import fine_tune, load_encoder
from clients.training.job import Candidate, Job
from clients.training.leakage import check_release, hold_out
from common.config import InstructionSection, LoraSection, RunConfig
from common.crossing import crossing_tensors
from common.errors import BaseMismatchError, FederationError
from common.files import write_atomic
from common.language.adapters import folder_digest, is_adapter, save_adapter
from common.models.base import load_tensors, save_model
from common.progress import Report
from common.vectors import apply, read_vector

if TYPE_CHECKING:
    from common.language.model import CausalLM

ZERO_SHOT, FINE_TUNED = "zero-shot", "fine-tuned"
_README = "# Universal model\n\nMade by Isthmus: the base model and a vector merged from several domains.\n"


def perform(job: Job, report: Report) -> dict[str, Any]:
    """Do what `job` says; returns what `run_job` returns. Raises IsthmusError."""
    if job.threads:
        torch.set_num_threads(job.threads)
    work = Path(job.work)
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work):
        domain = Domain.load(Path(job.domain))
        result = _MODES[job.mode](job, domain, report)
    result["peak_memory_bytes"] = peak_memory_bytes()
    write_atomic(job.file("result"), (json.dumps(result, indent=1) + "\n").encode())
    return result


def _fit(job: Job, domain: Domain, report: Report) -> dict[str, Any]:
    work, base = Path(job.work), Path(job.base)
    fits, limit = Path(job.fits or job.work), job.release
    limited = limit.max_tpr is not None
    rows = hold_out(domain, limit.held_out_users, job.config.run.seed) if limited else None
    trained_on = domain if rows is None else domain.with_users(rows[0])
    fitted = fine_tune(
        trained_on, base, job.config, fits, report, limits=job.limits, epsilon_spent=job.epsilon_spent
    )
    if rows is not None:
        check_release(fitted, domain, rows, base, job.config, limit, report)
    record = dataclasses.asdict(fitted)
    result: dict[str, Any] = {key: str(v) if isinstance(v, Path) else v for key, v in record.items()}
    result["users"] = len(trained_on.user_ids)
    result["evaluations"] = {}
    for label, folder in ((ZERO_SHOT, base), (FINE_TUNED, fitted.model_folder)):
        if job.evaluate_after_fit:
            result["evaluations"][label] = evaluate_once(
                folder, label, domain, job.config, work, report, base=base
            )
    return result


def _evaluate(job: Job, domain: Domain, report: Report) -> dict[str, Any]:
    return evaluate_once(Path(job.model), job.label, domain, job.config, Path(job.work), report)


def _candidates(job: Job, domain: Domain, report: Report) -> dict[str, Any]:
    work, base = Path(job.work), Path(job.base)
    evaluations = {}
    for candidate in job.candidates:
        folder = work / "candidates" / candidate.label
        compose(base, candidate, job.config, folder)
        evaluations[candidate.label] = {
            **evaluate_once(folder, candidate.label, domain, job.config, work, report, base=base),
            "model_folder": str(folder),
        }
        if not candidate.keep:
            shutil.rmtree(folder)
    return {"evaluations": evaluations}


def _answers(job: Job, domain: Domain, report: Report) -> dict[str, Any]:
    """`losses_e3` of a generation, and of how many users; answers of before cost nothing again."""
    from clients.data.instructions import rankings_of
    from clients.fitness import Answers, UserSamples
    from clients.training.language import load_language
    from common.language.evaluation import fit
    from common.language.generation import read_generation
    from common.language.pool import Pool
    from common.language.prompts import Template

    base, config = Path(job.base), job.config
    lora, section = config.lora, config.instruction or InstructionSection()
    table = crossing_tensors(base, config)
    pool = Pool({c.label: read_vector(Path(c.vector), table, c.codec) for c in job.candidates})
    candidates = read_generation(Path(job.numbers), len(pool))
    lm, template = load_language(base, config), Template.load(section.template)
    rankings = rankings_of(
        domain, "valid", config.run.seed, section.candidates, history_items=section.history_items,
        max_users=config.training.validation_users, title_words=section.title_words,
    )  # fmt: skip
    fitted = fit(lm, template, rankings, section.max_prompt_tokens)
    users = [UserSamples(one.user, (template.sample(one, section.objective),)) for one in fitted]
    answer = Answers(
        lm, lora or LoraSection(), pool, users, job.answers, Path(job.fits or job.work) / "answers",
        batch_size=config.evaluation.batch_size,
    )  # fmt: skip
    losses = []
    for number, candidate in enumerate(candidates):
        report(phase="answers", step=number, total=len(candidates))
        losses.append(answer(candidate))
    return {"losses_e3": losses, "users": len(users), "left": answer.left}


def compose(base: Path, candidate: Candidate, config: RunConfig, folder: Path) -> None:
    """Write base + vector as a model folder, or an adapter as an adapter's folder.

    Raises VectorError, BaseMismatchError (another digest).
    """
    tau = read_vector(Path(candidate.vector), crossing_tensors(base, config), candidate.codec)
    if config.lora is None:
        whole = apply(load_tensors(base), tau)
        tensors = {name: whole[name] for name in tau}
        save_model(base, tensors, folder, readme=_README, pooling=config.base.pooling)
    else:
        save_adapter(base, config.lora, tau, folder, _README, base_name=str(base))
    found = folder_digest(folder)
    if candidate.model_digest and found != candidate.model_digest:
        raise BaseMismatchError(
            f"the composed model has digest {found[:12]}, the server announced {candidate.model_digest[:12]}",
            next_step="use the run's base model and fetch the parcel again",
        )


def evaluate_once(
    model_folder: Path,
    label: str,
    domain: Domain,
    config: RunConfig,
    work: Path,
    report: Report,
    *,
    base: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the test set unless `work/evaluations` holds just that, under whatever label.

    An adapter's folder needs the `base` that it belongs to.

    Returns `{"label", "model_digest", "metrics", "users", "seconds", "key"}`; ranks of single users go
    to `work/per_user/<label>.parquet`.
    """
    digest = folder_digest(model_folder)
    statement: dict[str, Any] = {
        "model": digest,
        "data": data_digest(domain, config.text),
        "text": config.text.model_dump(mode="json"),
        "evaluation": config.evaluation.model_dump(mode="json"),
        "pooling": config.base.pooling,
        "precision": config.training.precision,
        "seed": config.run.seed,
    }
    if config.instruction is not None:
        statement["instruction"] = config.instruction.model_dump(mode="json")
    key = hashlib.sha256(json.dumps(statement, sort_keys=True).encode()).hexdigest()
    path = work / "evaluations" / f"{label}.json"
    for known in _known_evaluations(path.parent):
        if known.get("key") == key:
            record = {**known, "label": label}
            write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
            return record
    found = _evaluation(model_folder, base or model_folder, domain, config, report, f"evaluate {label}")
    found.write_per_user(work / "per_user" / f"{label}.parquet", domain)
    record = {
        "label": label,
        "model_digest": digest,
        "metrics": found.metrics,
        "users": found.users,
        "seconds": round(found.seconds, 3),
        "key": key,
    }
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    return record


def _evaluation(
    model_folder: Path, base: Path, domain: Domain, config: RunConfig, report: Report, phase: str
) -> Evaluation:
    if config.instruction is None:
        encoder = load_encoder(model_folder, config, training=False)
        return evaluate(encoder, domain, config, "test", report, phase=phase)
    from clients.training.language import wear
    from clients.training.ranking import evaluate_domain

    lm = _language(base, config.model_dump_json())
    wear(lm, base, config, model_folder if is_adapter(model_folder) else None)
    return evaluate_domain(lm, domain, config, "test", report, phase=phase)


@functools.lru_cache(maxsize=1)
def _language(base: Path, config: str) -> CausalLM:
    """The base with LoRA layers, loaded once for all candidates of a job."""
    from clients.training.language import load_language

    return load_language(base, RunConfig.model_validate_json(config))


def _known_evaluations(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            yield dict(json.loads(path.read_text(encoding="utf-8")))


_MODES = {"fit": _fit, "evaluate": _evaluate, "candidates": _candidates, "answers": _answers}


def peak_memory_bytes() -> int:
    """The most memory that this process held so far; 0 where the platform does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Keep a second trainer out of the same work folder (the lock goes when the process does)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (work / "trainer.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FederationError(
                f"another trainer is at work in {work}", next_step="wait for it, or end it"
            ) from None
        yield
