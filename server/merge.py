"""One entry point for every merge of a run: training-free or learned, journaled so that it is done once.

`run_merge` leaves `work/<label>/` with the merged vector, `merge.json` (method, options, digests of
all inputs, coefficients, seconds) and, for a learned method, its state and trajectory. Called again with
the same inputs it reads the result; with other inputs it merges anew; after a kill during learning it
goes on. Domains are taken in the order of their names, so the result does not depend on who came first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import create_model

from common.catalog import Catalog
from common.config import LearningSection, MergeMethod, RunConfig, validate
from common.errors import ConfigError, IsthmusError
from common.files import sha256_file, write_atomic
from common.models.base import model_digest
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector, read_vector, write_vector
from server.digests import catalog_digest, json_digest, vector_digest
from server.learning import LearnedMerge, learn
from server.learning.coefficients import Granularity
from server.learning.optimise import PLAIN, Objective
from server.merging import Options, methods, processes, unknown_name
from server.tensors import check_vectors, merge_tensors

SCHEMA_VERSION = 1
VECTOR_FILE = "vector.safetensors"
JOURNAL_FILE = "merge.json"

OBJECTIVES: dict[str, Objective] = {"adamerging": "adamerging", "mergerec": "mergerec"}
LEARNED_PAPERS = {
    "adamerging": "Yang et al., ICLR 2024 (entropy of pseudo-users' scores)",
    "mergerec": "MergeRec: L_rec + alpha L_KD on pseudo-users",
}


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


def known_methods() -> list[str]:
    """Names that a `[[merge]]` entry may have."""
    return sorted([*methods(), *OBJECTIVES])


def check_method(method: MergeMethod) -> dict[str, Any]:
    """The method's options, checked and complete. Raises ConfigError with the nearest known name.

    For a learned method: `granularity` ("domain" or "layer"), `process` ("none", "ties", ...) and the
    options of that process. Nothing is computed, so a run can be checked before it starts.
    """
    where = f"merge {method.label!r} options"
    if method.method in methods():
        if method.learning is not None:
            raise ConfigError(
                f"merge {method.label!r}: {method.method} learns nothing, but has a learning section",
                next_step=f"remove it, or use one of {', '.join(OBJECTIVES)}",
            )
        return validate(method.options, methods()[method.method].options, where=where).model_dump(mode="json")
    if method.method not in OBJECTIVES:
        raise unknown_name("merge method", method.method, known_methods())
    process = method.options.get("process", PLAIN)
    options = _learned_options(str(process))
    return validate(method.options, options, where=where).model_dump(mode="json")


def _learned_options(process: str) -> type[Options]:
    fields: dict[str, Any] = {
        "granularity": (Granularity, "layer"),
        "process": (Literal[PLAIN, *sorted(processes())], PLAIN),
    }
    if process in processes():
        for name, field in processes()[process].options.model_fields.items():
            fields[name] = (field.annotation, field)
    model: type[Options] = create_model("learned merge options", __base__=Options, **fields)
    return model


def run_merge(
    method: MergeMethod,
    base_folder: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    config: RunConfig,
    work: Path,
    report: Report = NO_REPORT,
) -> MergeResult:
    """Merge `taus` (domain -> vector) by `method`, or read what `work/<label>/` already has.

    Catalogs are needed by learned methods only. Raises ConfigError (method, options), VectorError
    (naming domain and tensor), DataError (catalog), ModelError (base, divergence), StorageError.
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
    if method.method in OBJECTIVES:
        learned = _learn(method, options, base_folder, taus, catalogs, config, folder, work, report)
        vector, coefficients, seconds = learned.vector, learned.coefficients, learned.seconds
    else:
        report(phase=f"merge {method.label}", step=0, total=1)
        vector = merge_tensors(method.method, taus, options)
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
        "seconds": round(seconds, 3),
        "vector_sha256": sha256_file(folder / VECTOR_FILE),
        "inputs": inputs,
    }
    write_atomic(folder / JOURNAL_FILE, json.dumps(record, indent=2).encode("ascii"))
    return _result(record, vector, folder, resumed=False)


def _learn(
    method: MergeMethod,
    options: dict[str, Any],
    base_folder: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    config: RunConfig,
    folder: Path,
    work: Path,
    report: Report,
) -> LearnedMerge:
    extra = {key: value for key, value in options.items() if key not in ("granularity", "process")}
    return learn(
        base_folder,
        taus,
        catalogs,
        objective=OBJECTIVES[method.method],
        granularity=options["granularity"],
        learning=method.learning or config.learning,
        text=config.text,
        work=folder,
        seed=config.run.seed,
        report=_prefixed(report, f"merge {method.label}"),
        pooling=config.base.pooling,
        process=options["process"],
        process_options=extra,
        cache=work / "embeddings",
    )


def _prefixed(report: Report, prefix: str) -> Report:
    """The same report with the merge's label before each phase but the main one."""

    def prefixed(
        *,
        phase: str,
        step: int = 0,
        total: int = 0,
        loss: float | None = None,
        bytes_sent: int | None = None,
    ) -> None:
        name = prefix if phase == "learn" else f"{prefix}: {phase}"
        report(phase=name, step=step, total=total, loss=loss, bytes_sent=bytes_sent)

    return prefixed


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
    if method.method in OBJECTIVES:
        inputs |= {
            "catalogs": {
                name: catalog_digest(catalogs[name], config.text.attributes)
                for name in sorted(taus)
                if name in catalogs
            },
            "learning": learning.model_dump(mode="json"),
            "text": config.text.model_dump(mode="json"),
            "pooling": config.base.pooling,
            "seed": config.run.seed,
        }
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
        trajectory_path=trajectory if record["method"] in OBJECTIVES else None,
        inputs=record["inputs"],
        resumed=resumed,
    )
