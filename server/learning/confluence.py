"""Confluence: the default merge. A balanced merge by Iso-C, then a short distillation of its weights.

1. `balance`: weights of the domains and a common scale, chosen on held-back pseudo-users, so that no domain
   is left behind.
2. `distil`: a few steps of all merged tensors towards the average of what each domain's own model and the
   balanced merge say of that domain's pseudo-users.
3. The distilled weights are kept if they agree better with the domains' models on the held-back pseudo-users
   than the balanced merge does, by the geometric mean over domains; else the result is the balanced merge.

Each part can be switched off: `rounds = 0` takes the rule as it is, `steps = 0` leaves distillation out. No
user's data are read anywhere. Embeddings, the scores of what was tried and the state of distillation are
kept: a killed merge goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from common.catalog import Catalog
from common.config import LearningSection, TextSection
from common.digests import json_digest, vector_digest
from common.files import write_atomic
from common.models.base import Pooling
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector
from server.learning.balance import Score, Trial, balance
from server.learning.choose import Judge
from server.learning.distil import Distillation, lessons
from server.learning.prepare import Inputs, load_inputs
from server.learning.teachers import EmbeddingCache
from server.merging import methods
from server.merging._models import Options
from server.tensors import merge_tensors

CONFLUENCE = "confluence"
CONFLUENCE_PAPER = "Isthmus: Iso-C balanced on pseudo-users, then distilled from the domains' models"
STATE_VERSION = 1


def rules() -> list[str]:
    """The training-free methods that can be balanced: those that need vectors alone."""
    return sorted(name for name, method in methods().items() if not method.needs and name != "emr")


class ConfluenceOptions(Options):
    """Options of `confluence`."""

    rule: Literal[tuple(rules())] = "iso-c"  # type: ignore[valid-type]
    rounds: Annotated[int, Field(ge=0, le=100)] = 4
    steps: Annotated[int, Field(ge=0, le=100_000)] = 300
    learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1e-4
    history_length: Annotated[int, Field(ge=1, le=50)] = 5
    probes: Annotated[int, Field(ge=1)] = 200  # held-back pseudo-users of a domain, at most
    probe_items: Annotated[int, Field(ge=2)] = 1000  # items of a domain that they rank, at most


@dataclass(frozen=True)
class Confluence:
    """The merged vector, each domain's weight times the scale, where the trials are, and what was found."""

    vector: TaskVector
    coefficients: dict[str, dict[str, float]]
    trajectory_path: Path
    seconds: float
    facts: dict[str, Any]


def confluence(
    base: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    options: ConfluenceOptions,
    *,
    learning: LearningSection,
    text: TextSection,
    work: Path,
    cache: Path,
    seed: int = 0,
    report: Report = NO_REPORT,
    pooling: Pooling | Literal["auto"] = "auto",
) -> Confluence:
    """Merge `taus` (domain -> vector) on the base model in folder `base`, on CUDA where there is one.

    Of `learning` the temperatures, the share that is held back (a tenth where it is 0) and the precision
    count; the rest is in `options`. `work` keeps the state of distillation, `cache` embeddings that other
    methods of the run can share. Raises VectorError, DataError, ConfigError for bad input, ModelError when a
    loss is not finite.
    """
    started_s = time.monotonic()
    changes = {
        "mask_seen": True,
        "holdout": learning.holdout or 0.1,
        "history_length": options.history_length,
        "holdout_users": options.probes,
        "holdout_items": options.probe_items,
    }
    learning = learning.model_copy(update=changes)
    inputs = load_inputs(base, taus, catalogs, learning, text, seed=seed, pooling=pooling)
    work.mkdir(parents=True, exist_ok=True)
    judge = Judge(inputs, "own", cache, report)

    def rule(weighted: Mapping[str, TaskVector]) -> TaskVector:
        return merge_tensors(options.rule, weighted)

    digest = _digest(inputs, options)
    score = _kept(judge.score, work / "scores.json", digest)
    vector, best, trials = balance(inputs.taus, rule, score, options.rounds, report)
    found: dict[str, Any] = {"rule": trials[0].agreement, "balanced": best.agreement}
    facts: dict[str, Any] = {"scale": best.scale, "weights": best.weights, "agreement": found}
    if options.steps:
        given = lessons(inputs, vector, options.steps, EmbeddingCache(cache), report)
        distillation = Distillation(inputs, vector, options.steps, options.learning_rate)
        distilled = distillation.run(given, work / "student.safetensors", digest, report)
        after = Trial(best.scale, best.weights, dict(score(distilled)))
        found["distilled"] = after.agreement
        facts["fallback"] = after.worth <= best.worth
        vector = vector if facts["fallback"] else distilled
    return Confluence(
        vector=vector,
        coefficients=_table(best),
        trajectory_path=_trajectory(work / "trajectory.jsonl", trials),
        seconds=time.monotonic() - started_s,
        facts=facts,
    )


def _digest(inputs: Inputs, options: ConfluenceOptions) -> str:
    """Of all that the result depends on, so that what is kept is not taken for another merge's."""
    return json_digest(
        {
            "version": STATE_VERSION,
            "domains": {name: inputs.key(name, name) for name in inputs.domains},
            "options": options.model_dump(mode="json"),
            "learning": inputs.learning.model_dump(mode="json"),
            "seed": inputs.seed,
        }
    )


def _kept(score: Score, path: Path, digest: str) -> Score:
    """`score` that remembers in the file `path` what it said of a vector, for the same `digest`."""
    try:
        record = json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        record = {}
    is_ours = isinstance(record, dict) and record.get("digest") == digest
    said: dict[str, dict[str, float]] = record["said"] if is_ours else {}

    def scored(vector: TaskVector) -> Mapping[str, float]:
        key = vector_digest(vector)
        if key not in said:
            said[key] = dict(score(vector))
            write_atomic(path, json.dumps({"digest": digest, "said": said}).encode("ascii"))
        return said[key]

    return scored


def _table(trial: Trial) -> dict[str, dict[str, float]]:
    return {"all": {name: trial.scale * weight for name, weight in trial.weights.items()}}


def _trajectory(path: Path, trials: Sequence[Trial]) -> Path:
    """The trials, a line each, as learned merges write their steps; the loss is 1 - geometric mean."""
    lines = [
        {"step": step, "loss": 1 - trial.worth, "coefficients": _table(trial), "agreement": trial.agreement}
        for step, trial in enumerate(trials)
    ]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines).encode("ascii"))
    return path
