"""Fine-tune a base model on one domain, and write what it changed as a task vector.

    result = fine_tune(domain, resolve_base("embedded"), RunConfig(), Path("work"))
    result.vector_path, result.model_folder

The work folder has one folder for each (configuration, base, data); its `result.json` is the journal: a
finished fine-tuning is returned, never repeated. Killed at any point and called again, training goes
on from its last checkpoint and ends with the same tensors as without the kill. Of two processes with the same
fine-tuning one waits for the other. The fine-tuned model is
`theta_0 + tau` with tau as it was written, codec included: what the server reconstructs, bit for bit.
With differential privacy (`clients.training.private`) the same holds; what was spent lies beside the vector.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from clients.data.domain import Domain
from clients.privacy import NO_LIMITS, PrivacyLimits, write_claim
from clients.training.accounting import NOISE_KEY, PrivacyPlan, plan_privacy
from clients.training.adapters import AdapterTower, load_adapted
from clients.training.checkpoint import newest_checkpoint
from clients.training.dataset import Batch, TrainingBatches, data_digest, domain_tokens
from clients.training.evaluate import evaluate
from clients.training.loss import TwoTower
from clients.training.trainer import BEST_PREFIX, EncoderTrainer, Plan, Validate
from common.config import RunConfig
from common.crossing import crossing_tensors
from common.errors import ModelError
from common.files import sha256_file, write_atomic
from common.language.adapters import save_adapter
from common.models.base import load_tensors, model_digest, save_model, trainable_tensors
from common.models.device import default_device
from common.models.encoder import Encoder
from common.models.packed import PLAIN_TOKENS
from common.parcels import Privacy
from common.progress import NO_REPORT, Report
from common.vectors import apply, read_vector, subtract, write_vector

JOURNAL = "result.json"
README = """# A domain's fine-tuned model

Made by Isthmus from private interactions. It stays with its owner: do not publish it.
"""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """A finished fine-tuning. `seconds` is wall-clock, earlier attempts included; `steps` those taken."""

    vector_path: Path
    vector_sha256: str
    model_folder: Path
    steps: int
    best_step: int
    validation_ndcg: float
    seconds: float
    resumed: bool


@dataclasses.dataclass(frozen=True)
class Trained:
    """The best tensors that `train` found (CPU), by their names in the model's file."""

    tensors: dict[str, Tensor]
    steps: int
    best_step: int
    score: float
    seconds: float
    resumed: bool


def fine_tune(
    domain: Domain,
    base_folder: Path,
    config: RunConfig,
    work: Path,
    report: Report = NO_REPORT,
    *,
    device: str | None = None,
    limits: PrivacyLimits = NO_LIMITS,
    epsilon_spent: float = 0.0,
) -> FitResult:
    """Fine-tune on `domain.train`, stop early on `domain.valid`, write the vector of the best step.

    With differential privacy: as many steps as planned, and the vector of the last one. `device` None takes
    CUDA where there is one. Raises GateError (more would be spent than `limits` leave after `epsilon_spent`),
    ConfigError, DataError (too few examples), ModelError (the loss is not finite, or a frozen tensor moved),
    VectorError, StorageError.
    """
    folder = fit_folder(domain, base_folder, config, work)
    finished = _finished(folder)
    if finished is not None:
        return finished
    limits.check_run(config)
    privacy = plan_privacy(config, len(domain.user_ids))
    limits.check(_facts(privacy), epsilon_spent)
    report(phase="prepare")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, report):
        return _finished(folder) or _train_and_write(
            domain, base_folder, config, folder, report, device, privacy
        )


def _train_and_write(
    domain: Domain,
    base_folder: Path,
    config: RunConfig,
    folder: Path,
    report: Report,
    device: str | None,
    privacy: PrivacyPlan | None,
) -> FitResult:
    if config.instruction is not None:
        from clients.training.language import fine_tune_adapter  # peft is large

        return fine_tune_adapter(domain, base_folder, config, folder, report, device=device)
    training = config.training
    encoder = load_encoder(base_folder, config, device=device)
    batches, kind = _batches(encoder, domain, config, privacy, folder)
    trained = train(
        encoder,
        batches,
        validator(encoder, domain, config, report),
        base_folder,
        config,
        folder,
        report,
        max_steps=training.max_steps,
        eval_every_steps=training.eval_every_steps if privacy is None else training.max_steps,
        kind=kind,
    )
    report(phase="write", step=trained.steps, total=training.max_steps)
    return write_result(folder, base_folder, config, trained, _facts(privacy))


def _facts(privacy: PrivacyPlan | None) -> Privacy:
    return Privacy() if privacy is None else privacy.facts()


@contextmanager
def _alone(folder: Path, report: Report) -> Iterator[None]:
    """Hold the folder of a fine-tuning; where another process trains in it, wait until that has ended."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(phase="wait for another process")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _batches(
    encoder: Encoder, domain: Domain, config: RunConfig, privacy: PrivacyPlan | None, folder: Path
) -> tuple[torch.utils.data.Dataset[Batch], type[EncoderTrainer]]:
    """The training batches, and the trainer that takes them."""
    if privacy is None:
        return TrainingBatches(encoder, domain, config, config.training.max_steps), EncoderTrainer
    from clients.training.private import PrivateBatches, PrivateTrainer, SecretRandom  # opacus is large

    return PrivateBatches(encoder, domain, config, privacy, SecretRandom(folder / NOISE_KEY)), PrivateTrainer


def fit_folder(domain: Domain, base_folder: Path, config: RunConfig, work: Path) -> Path:
    """The folder in `work` of this configuration, base and data; equal inputs give the same."""
    return work / fit_key([domain], base_folder, config)


def fit_key(domains: Sequence[Domain], base_folder: Path, config: RunConfig) -> str:
    """Names everything that the outcome of a fine-tuning depends on (16 hexadecimal digits)."""
    statement = {
        "training": config.training.model_dump(mode="json"),
        "text": config.text.model_dump(mode="json"),
        "pooling": config.base.pooling,
        "seed": config.run.seed,
        "k": config.evaluation.k,
        "base": model_digest(base_folder),
        "data": [data_digest(domain, config.text) for domain in domains],
    }
    for name in ("lora", "instruction"):
        if (section := getattr(config, name)) is not None:
            statement[name] = section.model_dump(mode="json", exclude={"objective"})  # merges', not a fit's
    if config.privacy.mechanism != "none":
        statement["privacy"] = config.privacy.model_dump(mode="json")
    return hashlib.sha256(json.dumps(statement, sort_keys=True).encode()).hexdigest()[:16]


def load_encoder(
    folder: Path, config: RunConfig, *, device: str | None = None, training: bool = True
) -> Encoder:
    """The encoder as the configuration wants it, on CUDA where there is one (`device` None).

    With differential privacy without dropout, since its random state is public and one user more would shift
    the others' masks; and padded, since users' gradients are told apart by their rows. Otherwise training on
    the CPU leaves padding out, up to the length at which packed attention is spelt out.
    """
    is_private = config.privacy.mechanism != "none"
    dropout = 0.0 if is_private else config.training.dropout
    return load_adapted(
        folder,
        pooling=config.base.pooling,
        device=default_device(device),
        precision=config.training.precision,
        dropout=dropout if training else None,
        for_training=training,
        packed=training and not is_private and config.text.max_seq_len <= PLAIN_TOKENS,
    )


def validator(encoder: Encoder, domain: Domain, config: RunConfig, report: Report) -> Validate:
    """A function that ranks a fixed draw of validation users with the encoder as it is."""
    tokens = domain_tokens(encoder, domain, config.text)
    users = config.training.validation_users

    def validate() -> dict[str, float]:
        found = evaluate(
            encoder, domain, config, "valid", report, max_users=users, tokens=tokens, phase="validate"
        )
        return found.metrics

    return validate


def train(
    encoder: Encoder,
    batches: torch.utils.data.Dataset[Batch],
    validate: Validate,
    base_folder: Path,
    config: RunConfig,
    folder: Path,
    report: Report,
    *,
    max_steps: int,
    eval_every_steps: int,
    kind: type[EncoderTrainer] = EncoderTrainer,
) -> Trained:
    """Train the encoder in place from its newest checkpoint in `folder`; returns the best tensors.

    `batches` are of the sort that a trainer of this `kind` takes.
    """
    plan = plan_of(config, max_steps=max_steps, eval_every_steps=eval_every_steps)
    tower = (
        TwoTower(encoder, set(trainable_tensors(base_folder)), config.training.temperature)
        if config.lora is None
        else AdapterTower(encoder, base_folder, config)
    )
    trained = train_tower(kind(tower, batches, validate, plan, folder, report))
    check_frozen(tower, base_folder)
    return trained


def plan_of(config: RunConfig, *, max_steps: int, eval_every_steps: int) -> Plan:
    """What `config.training` says, as a trainer takes it."""
    section = config.training
    return Plan(
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        warmup_steps=section.warmup_steps,
        max_steps=max_steps,
        eval_every_steps=eval_every_steps,
        checkpoint_every_steps=section.checkpoint_every_steps,
        patience=section.patience,
        max_minutes=section.max_minutes,
        seed=config.run.seed,
        metric=f"ndcg@{config.evaluation.k}",
    )


def train_tower(trainer: EncoderTrainer) -> Trained:
    """Train from the newest checkpoint in the trainer's folder; returns the best tensors."""
    folder = trainer.folder
    checkpoint = newest_checkpoint(folder)
    step = trainer.restore(checkpoint)
    if not trainer.progress.finished(step, trainer.plan):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
    trainer.close()
    best = load_file(folder / f"{BEST_PREFIX}{trainer.progress.best_step}.safetensors")
    trainer.tower.backbone.eval()
    return Trained(
        tensors=dict(best),
        steps=step,
        best_step=trainer.progress.best_step,
        score=trainer.progress.best_score,
        seconds=trainer.elapsed_s(),
        resumed=checkpoint is not None,
    )


def check_frozen(tower: TwoTower, base_folder: Path) -> None:
    """Raise ModelError unless every tensor that must not train is the base's, bit for bit."""
    now = {  # adapted layers hold the base's tensors one level deeper
        name.replace(".base_layer.", "."): parameter
        for name, parameter in tower.backbone.named_parameters()
        if ".lora_" not in name
    }
    frozen = sorted(set(now) - set(tower.trained_tensors()))
    for name, tensor in load_tensors(base_folder, frozen).items():
        if not torch.equal(now[name].detach().cpu(), tensor):
            raise ModelError(f"frozen tensor {name!r} changed", next_step="do not send this model anywhere")


def write_result(
    folder: Path, base_folder: Path, config: RunConfig, trained: Trained, facts: Privacy
) -> FitResult:
    """Write the vector and the model that it gives, codec included; journal them, and clear up.

    Raises VectorError (not finite), StorageError.
    """
    codec, lora = config.training.vector_codec, config.lora
    vector_path, model_folder = folder / "vector.safetensors", folder / "model"
    base = load_tensors(base_folder) if lora is None else {}
    write_vector(vector_path, subtract(trained.tensors, base) if lora is None else trained.tensors, codec)
    tau = read_vector(vector_path, crossing_tensors(base_folder, config), codec)
    if lora is None:
        whole = apply(base, tau)
        fine_tuned = {name: whole[name] for name in tau}
        save_model(base_folder, fine_tuned, model_folder, readme=README, pooling=config.base.pooling)
    else:
        save_adapter(base_folder, lora, tau, model_folder, README, base_name=str(base_folder))
    result = FitResult(
        vector_path=vector_path,
        vector_sha256=sha256_file(vector_path),
        model_folder=model_folder,
        steps=trained.steps,
        best_step=trained.best_step,
        validation_ndcg=trained.score,
        seconds=round(trained.seconds, 3),
        resumed=trained.resumed,
    )
    record = {
        **dataclasses.asdict(result),
        "vector_path": vector_path.name,
        "model_folder": model_folder.name,
    }
    if facts != Privacy():
        write_claim(vector_path, facts)
    write_atomic(folder / JOURNAL, (json.dumps(record, indent=2) + "\n").encode())
    for path in (*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{BEST_PREFIX}*.safetensors"):
        path.unlink()
    (folder / NOISE_KEY).unlink(missing_ok=True)
    return result


def _finished(folder: Path) -> FitResult | None:
    """The journaled result, if it is there and its vector is still the one that was written."""
    try:
        record = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    record["vector_path"], record["model_folder"] = (
        folder / record["vector_path"],
        folder / record["model_folder"],
    )
    result = FitResult(**record)
    if not result.vector_path.is_file() or sha256_file(result.vector_path) != result.vector_sha256:
        raise ModelError(
            f"{result.vector_path}: is not the vector that was journaled",
            next_step=f"restore it, or remove {folder} to fine-tune again",
        )
    return result
