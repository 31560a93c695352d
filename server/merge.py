"""One entry point for every merge of a run, training-free, learned or chosen; journaled, so it is done once.

`run_merge` leaves `work/<label>/` with the merged vector, `merge.json` (method, options, digests of
all inputs, coefficients, seconds) and, for a learned method, its state and trajectory; for "auto" the merges
it chose among are in `candidates/`, and `facts` of `merge.json` says why. Called again with
the same inputs it reads the result; with other inputs it merges anew; after a kill during learning it
goes on. Domains are taken in the order of their names, so the result does not depend on who came first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.catalog import Catalog
from common.config import LearningSection, MergeMethod, RunConfig, validate
from common.errors import ConfigError, IsthmusError
from common.files import sha256_file, write_atomic
from common.models.base import model_digest
from common.progress import NO_REPORT, Report, prefixed
from common.vectors import TaskVector, read_vector, write_vector
from server.digests import catalog_digest, json_digest, vector_digest
from server.learning import LearnedMerge, learn
from server.learning.choose import Judge, pick
from server.learning.grams import GRAM_ITEMS, LayerGrams, gram_matrices
from server.learning.losses import LOSSES
from server.learning.options import AUTO, AUTO_PAPER, check_learned, parse_candidates
from server.learning.prepare import load_inputs
from server.merging import methods, unknown_name
from server.tensors import check_vectors, merge_tensors

SCHEMA_VERSION = 1
VECTOR_FILE = "vector.safetensors"
JOURNAL_FILE = "merge.json"

LEARNED_PAPERS = {**{name: loss.paper for name, loss in LOSSES.items()}, AUTO: AUTO_PAPER}


@dataclass(frozen=True)
class MergeResult:
    """One merge of a run. `coefficients` is `{group: {domain: lambda}}`, empty for training-free methods."""

    label: str
    method: str
    options: dict[str, Any]  # resolved: every option with its value
    domains: list[str]
    vector: TaskVector
    coefficients: dict[str, dict[str, float]]
    seconds: float
    trajectory_path: Path | None
    inputs: dict[str, Any]  # digests and settings that the result follows from
    resumed: bool  # read from the journal, not merged again
    facts: dict[str, Any] = field(default_factory=dict)  # how learning went, or why `auto` chose what it did


def known_methods() -> list[str]:
    """Names that a `[[merge]]` entry may have."""
    return sorted([*methods(), *LEARNED_PAPERS])


def check_method(method: MergeMethod) -> dict[str, Any]:
    """The method's options, checked and complete. Raises ConfigError with the nearest known name.

    For a learned method: `granularity` ("domain", "layer", "tensor"), `process` ("none", "ties", ...) and the
    options of that process. Nothing is computed, so a run can be checked before it starts.
    """
    where = f"merge {method.label!r} options"
    if method.method in methods():
        if method.learning is not None:
            raise ConfigError(
                f"merge {method.label!r}: {method.method} learns nothing, but has a learning section",
                next_step=f"remove it, or use one of {', '.join(LEARNED_PAPERS)}",
            )
        return validate(method.options, methods()[method.method].options, where=where).model_dump(mode="json")
    if method.method not in LEARNED_PAPERS:
        raise unknown_name("merge method", method.method, known_methods())
    return check_learned(method, where, check_method)


def run_merge(
    method: MergeMethod,
    base_folder: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    config: RunConfig,
    work: Path,
    report: Report = NO_REPORT,
    cache: Path | None = None,
) -> MergeResult:
    """Merge `taus` (domain -> vector) by `method`, or read what `work/<label>/` already has.

    `cache` (default `work/embeddings`) keeps embeddings that several merges of a run read.
    Catalogs are needed by learned methods and by those that need Gram matrices. Raises ConfigError
    (method, options), VectorError (naming domain and tensor), DataError (catalog), ModelError (base,
    divergence), StorageError.
    """
    options = check_method(method)
    domains = sorted(taus)
    taus = {name: taus[name] for name in domains}
    check_vectors(taus)
    learning = method.learning or config.learning
    folder = work / method.label
    inputs = _inputs(method, options, base_folder, taus, catalogs, config, learning)
    shapes = {name: tuple(tensor.shape) for name, tensor in taus[domains[0]].items()}
    found = _read(folder, inputs, shapes)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    coefficients: dict[str, dict[str, float]] = {}
    facts: dict[str, Any] = {}
    cache = cache or work / "embeddings"
    if method.method in LOSSES:
        learned = _learn(method, options, base_folder, taus, catalogs, config, folder, cache, report)
        vector, coefficients, seconds = learned.vector, learned.coefficients, learned.seconds
        facts = learned.facts
    elif method.method == AUTO:
        chosen, facts = _choose(method, options, base_folder, taus, catalogs, config, folder, cache, report)
        vector, coefficients, seconds = chosen.vector, chosen.coefficients, time.monotonic() - started_s
    else:
        report(phase=f"merge {method.label}", step=0, total=1)
        grams = _grams(method, base_folder, taus, catalogs, config, report)
        vector = merge_tensors(method.method, taus, options, grams)
        seconds = time.monotonic() - started_s
        report(phase=f"merge {method.label}", step=1, total=1)
    write_vector(folder / VECTOR_FILE, vector, "fp32")
    record = {
        "schema": SCHEMA_VERSION,
        "label": method.label,
        "method": method.method,
        "options": options,
        "domains": domains,
        "coefficients": coefficients,
        "facts": facts,
        "seconds": round(seconds, 3),
        "vector_sha256": sha256_file(folder / VECTOR_FILE),
        "inputs": inputs,
    }
    write_atomic(folder / JOURNAL_FILE, json.dumps(record, indent=2).encode("ascii"))
    return _result(record, vector, folder, resumed=False)


def _needs_grams(method: MergeMethod) -> bool:
    return method.method in methods() and methods()[method.method].needs == "grams"


def _grams(
    method: MergeMethod,
    base_folder: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    config: RunConfig,
    report: Report,
) -> LayerGrams | None:
    """What the method needs of the catalogs; computed while it merges, layer by layer."""
    if not _needs_grams(method):
        return None
    report = prefixed(report, f"merge {method.label}")
    return gram_matrices(base_folder, taus, catalogs, config.text, seed=config.run.seed, report=report)


def _learn(
    method: MergeMethod,
    options: dict[str, Any],
    base_folder: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    config: RunConfig,
    folder: Path,
    cache: Path,
    report: Report,
) -> LearnedMerge:
    extra = {key: value for key, value in options.items() if key not in ("granularity", "process")}
    return learn(
        base_folder,
        taus,
        catalogs,
        objective=method.method,
        granularity=options["granularity"],
        learning=method.learning or config.learning,
        text=config.text,
        work=folder,
        seed=config.run.seed,
        report=prefixed(report, f"merge {method.label}"),
        pooling=config.base.pooling,
        process=options["process"],
        process_options=extra,
        cache=cache,
    )


def _choose(
    method: MergeMethod,
    options: dict[str, Any],
    base_folder: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    config: RunConfig,
    folder: Path,
    cache: Path,
    report: Report,
) -> tuple[MergeResult, dict[str, Any]]:
    """Merge by every candidate, score each, and return the chosen one with the reasons."""
    learning, text, report = method.learning or config.learning, config.text, prefixed(report, method.label)
    seed, pooling = config.run.seed, config.base.pooling
    inputs = load_inputs(base_folder, taus, catalogs, learning, text, seed=seed, pooling=pooling)
    judge = Judge(inputs, options["target"], cache, report)
    config = config.model_copy(update={"learning": learning})

    def merge(candidate: MergeMethod) -> MergeResult:
        return run_merge(candidate, base_folder, taus, catalogs, config, folder / "candidates", report, cache)

    candidates = parse_candidates(options["candidates"])
    scores = {label: judge.score(merge(candidate).vector) for label, candidate in candidates.items()}
    choice = pick(scores, options["margin"])
    return merge(candidates[choice["chosen"]]), choice


def _inputs(
    method: MergeMethod,
    options: dict[str, Any],
    base_folder: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    config: RunConfig,
    learning: LearningSection,
) -> dict[str, Any]:
    """All that the result follows from, as digests and settings."""
    inputs: dict[str, Any] = {
        "base_model": model_digest(base_folder),
        "vectors": {name: vector_digest(taus[name]) for name in sorted(taus)},
    }
    if method.method in LEARNED_PAPERS or _needs_grams(method):
        inputs |= {
            "catalogs": {
                name: catalog_digest(catalogs[name], config.text.attributes)
                for name in sorted(taus)
                if name in catalogs
            },
            "text": config.text.model_dump(mode="json"),
            "seed": config.run.seed,
        }
    if method.method in LEARNED_PAPERS:
        inputs |= {"learning": learning.model_dump(mode="json"), "pooling": config.base.pooling}
    elif _needs_grams(method):
        inputs |= {"items_per_domain": GRAM_ITEMS}
    key = {"schema": SCHEMA_VERSION, "method": method.method, "options": options, **inputs}
    return {**inputs, "digest": json_digest(key)}


def _read(folder: Path, inputs: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> MergeResult | None:
    """The journaled result if it is whole and of these inputs."""
    try:
        record = json.loads((folder / JOURNAL_FILE).read_text(encoding="ascii"))
        if record["inputs"]["digest"] != inputs["digest"]:
            return None
        if sha256_file(folder / VECTOR_FILE) != record["vector_sha256"]:
            return None
        vector = read_vector(folder / VECTOR_FILE, shapes, "fp32")
        return _result(record, vector, folder, resumed=True)
    except (OSError, ValueError, KeyError, TypeError, IsthmusError):
        return None  # absent or damaged: merge again


def _result(record: dict[str, Any], vector: TaskVector, folder: Path, *, resumed: bool) -> MergeResult:
    trajectory = folder / "trajectory.jsonl"
    return MergeResult(
        label=record["label"],
        method=record["method"],
        options=record["options"],
        domains=record["domains"],
        vector=vector,
        coefficients=record["coefficients"],
        seconds=record["seconds"],
        trajectory_path=trajectory if record["method"] in LOSSES else None,
        inputs=record["inputs"],
        resumed=resumed,
        facts=record.get("facts", {}),
    )
