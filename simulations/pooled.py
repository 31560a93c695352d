"""Joint training on pooled data: what merging is measured against, and what no deployment may do.

One model is fine-tuned on the examples of all domains together, by the same recipe and parts as inside
a domain. A batch holds one domain at a time, so that negatives are items of the same catalog; domains
take turns in proportion to their examples. It needs every domain's interactions in one place: it exists
for simulations alone, and neither `clients` nor `server` can import it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from clients.data.domain import Domain
from clients.training.dataset import Batch, TrainingBatches
from clients.training.fit import fit_key, load_encoder, train, validator
from clients.training.perform import evaluate_once
from clients.training.trainer import Validate
from common.config import RunConfig, validate
from common.files import write_atomic
from common.guard import check_imports
from common.models.base import resolve_base, save_model
from common.progress import NO_REPORT, Report, StatusFile
from simulations.config import SimulationConfig

_README = """# Joint reference model

Trained by Isthmus on the pooled interactions of all domains of a simulation: an upper reference, not private.
"""


@dataclasses.dataclass(frozen=True)
class PooledResult:
    """The jointly trained model; `score` is the mean validation NDCG over domains at its best step."""

    model_folder: Path
    steps: int
    best_step: int
    score: float
    seconds: float


class PooledBatches(Dataset[Batch]):
    """Batches of several domains, one domain a batch, in a seeded order that is the same after a restart."""

    def __init__(self, parts: Sequence[TrainingBatches], steps: int, seed: int) -> None:
        share_D = np.array([part.examples for part in parts], dtype=np.float64)
        order_S = np.random.default_rng([seed, len(parts)]).choice(
            len(parts), size=steps, p=share_D / share_D.sum()
        )
        self._parts, self._order_S = parts, order_S
        self._turn_S = [int((order_S[:step] == order_S[step]).sum()) for step in range(steps)]

    def __len__(self) -> int:
        return len(self._order_S)

    def __getitem__(self, step: int) -> Batch:
        return self._parts[int(self._order_S[step])][self._turn_S[step]]


def train_pooled(
    domains: Sequence[Domain],
    base_folder: Path,
    config: RunConfig,
    work: Path,
    *,
    steps: int | None = None,
    report: Report = NO_REPORT,
) -> PooledResult:
    """Fine-tune one model on all domains. `steps` None: as many as the domains have together.

    Validation is the mean over domains, every `eval_every_steps` of each. A finished run of the same
    configuration and data in `work` is returned, an interrupted one goes on.
    """
    steps = steps or config.training.max_steps * len(domains)
    work = work / f"{fit_key(domains, base_folder, config)}-{steps}"
    journal = work / "pooled.json"
    if journal.is_file():
        record = json.loads(journal.read_text(encoding="utf-8"))
        return PooledResult(**{**record, "model_folder": work / "model"})
    work.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(base_folder, config)
    parts = [TrainingBatches(encoder, domain, config, steps) for domain in domains]
    validations = [validator(encoder, domain, config, report) for domain in domains]
    trained = train(
        encoder,
        PooledBatches(parts, steps, config.run.seed),
        _mean_of(validations),
        base_folder,
        config,
        work,
        report,
        max_steps=steps,
        eval_every_steps=config.training.eval_every_steps * len(domains),
    )
    save_model(base_folder, trained.tensors, work / "model", readme=_README, pooling=config.base.pooling)
    result = PooledResult(
        work / "model", trained.steps, trained.best_step, trained.score, round(trained.seconds, 3)
    )
    write_atomic(journal, json.dumps({**dataclasses.asdict(result), "model_folder": "model"}).encode())
    return result


def joint_reference(
    domains: Mapping[str, Domain], config: RunConfig, work: Path, *, steps: int | None = None
) -> dict[str, dict[str, float]]:
    """Train jointly and evaluate on each domain's test set: `{domain: {"recall@10": ..., "ndcg@10": ...}}`.

    Progress is in `work/status.json`.
    """
    report = StatusFile(work / "status.json", domain="joint")
    base = resolve_base(config.base.model)
    result = train_pooled(list(domains.values()), base, config, work, steps=steps, report=report)
    found = {}
    for name, domain in domains.items():
        record = evaluate_once(result.model_folder, f"joint-{name}", domain, config, work, report)
        found[name] = dict(record["metrics"])
    return found


def main(out: Path) -> None:
    """The joint reference of the simulation in `out`; writes `out/joint/result.json`."""
    record = json.loads((out / "config.json").read_text(encoding="utf-8"))
    record.pop("base_digest")
    config = validate(record, SimulationConfig, where=str(out / "config.json"))
    domains = {source.name: Domain.load(out / "data" / source.name) for source in config.domain}
    steps = config.simulation.joint_steps
    found = joint_reference(domains, config.run_config(), out / "joint", steps=steps)
    write_atomic(out / "joint" / "result.json", json.dumps(found).encode())


def _mean_of(validations: Sequence[Validate]) -> Validate:
    def validate() -> dict[str, float]:
        found = [single() for single in validations]
        return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}

    return validate


if __name__ == "__main__":
    check_imports()
    main(Path(sys.argv[1]))
