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
from typing import TYPE_CHECKING, Any

from common.catalog import Catalog
from common.config import LoraSection, MergeMethod, RunConfig, validate
from common.digests import catalog_digest, json_digest, vector_digest
from common.errors import ConfigError, IsthmusError
from common.files import sha256_file, write_atomic
from common.language.adapters import adapter_tensors, check_adapter
from common.models.base import model_digest
from common.progress import NO_REPORT, Report, prefixed
from common.vectors import TaskVector, read_vector, write_vector
from server.learning import learn
from server.learning.choose import Judge, pick
from server.learning.confluence import CONFLUENCE, CONFLUENCE_PAPER, ConfluenceOptions, confluence
from server.learning.grams import GRAM_ITEMS, gram_matrices
from server.learning.losses import LOSSES
from server.learning.options import AUTO, AUTO_PAPER, check_learned, parse_candidates
from server.learning.prepare import load_inputs
from server.merging import methods, unknown_name
from server.tensors import check_vectors, merge_tensors

if TYPE_CHECKING:
    from server.asking import Asking

SCHEMA_VERSION = 1
VECTOR_FILE = "vector.safetensors"
JOURNAL_FILE = "merge.json"
TRAJECTORY_FILE = "trajectory.jsonl"

LEARNED_PAPERS = {
    **{name: loss.paper for name, loss in LOSSES.items()},
    CONFLUENCE: CONFLUENCE_PAPER,
    AUTO: AUTO_PAPER,
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
    facts: dict[str, Any] = field(default_factory=dict)  # how learning went, or why `auto` chose what it did


def known_methods() -> list[str]:
    """Names that a `[[merge]]` entry may have."""
    return sorted([*methods(), *LEARNED_PAPERS])


def check_method(method: MergeMethod, config: RunConfig | None = None) -> dict[str, Any]:
    """The method's options, checked and complete. Raises ConfigError with the nearest known name.

    With the `config` of a run that has `[lora]` the methods are those of `server.language.registry`.

    For a learned method: `granularity` ("domain", "layer", "tensor"), `process` ("none", "ties", ...) and the
    options of that process. Nothing is computed, so a run can be checked before it starts.
    """
    where = f"merge {method.label!r} options"
    if config is not None and config.lora is not None:
        return _check_adapter_method(method)
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
    asking: Asking | None = None,
) -> MergeResult:
    """Merge `taus` (domain -> vector) by `method`, or read what `work/<label>/` already has.

    `cache` (default `work/embeddings`) keeps embeddings that several merges of a run read. `asking` are the
    domains of a run under way, for a merge that asks them.
    Catalogs are needed by learned methods and by those that need Gram matrices. Raises ConfigError
    (method, options), VectorError (naming domain and tensor), DataError (catalog), ModelError (base,
    divergence), StorageError.
    """
    options = check_method(method, config)
    taus = {name: taus[name] for name in sorted(taus)}
    check_vectors(taus)
    config = config.model_copy(update={"learning": method.learning or config.learning})
    folder = work / method.label
    embeddings = cache or work / "embeddings"
    job = _Job(method, options, base_folder, taus, catalogs, config, folder, embeddings, asking)
    inputs = job.inputs()
    shapes = {name: tuple(tensor.shape) for name, tensor in next(iter(taus.values())).items()}
    found = _read(folder, inputs, shapes)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    merged = job.run(report)
    write_vector(folder / VECTOR_FILE, merged.vector, "fp32")
    record = {
        "schema": SCHEMA_VERSION,
        "label": method.label,
        "method": method.method,
        "options": options,
        "domains": list(taus),
        "coefficients": merged.coefficients,
        "facts": merged.facts,
        "seconds": round(merged.seconds, 3),
        "vector_sha256": sha256_file(folder / VECTOR_FILE),
        "inputs": inputs,
    }
    write_atomic(folder / JOURNAL_FILE, json.dumps(record, indent=2).encode("ascii"))
    return _result(record, merged.vector, folder, resumed=False)


@dataclass(frozen=True)
class _Merged:
    """What a merge gives, however it came about."""

    vector: TaskVector
    seconds: float
    coefficients: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """One merge: a checked method, what it reads, and the folder that keeps its progress."""

    method: MergeMethod
    options: dict[str, Any]
    base_folder: Path
    taus: Mapping[str, TaskVector]
    catalogs: Mapping[str, Catalog]
    config: RunConfig  # its learning section is the method's own where it has one
    folder: Path
    cache: Path
    asking: Asking | None

    def run(self, report: Report) -> _Merged:
        if self.config.lora is not None:
            return self._merge_adapters(
                self.config.lora, prefixed(report, f"merge {self.method.label}", "merge")
            )
        if self.method.method in LOSSES:
            return self._learn(prefixed(report, f"merge {self.method.label}"))
        if self.method.method == CONFLUENCE:
            return self._flow_together(prefixed(report, f"merge {self.method.label}"))
        if self.method.method == AUTO:
            return self._choose(prefixed(report, self.method.label))
        return self._merge(report)

    def inputs(self) -> dict[str, Any]:
        """All that the result follows from, as digests and settings."""
        config = self.config
        learns = config.lora is None and self.method.method in LEARNED_PAPERS
        inputs: dict[str, Any] = {
            "base_model": model_digest(self.base_folder),
            "vectors": {name: vector_digest(tau) for name, tau in self.taus.items()},
        }
        if learns or self._needs_grams:
            inputs |= {
                "catalogs": self._catalog_digests(),
                "text": config.text.model_dump(mode="json"),
                "seed": config.run.seed,
            }
        if learns:
            inputs |= {"learning": config.learning.model_dump(mode="json"), "pooling": config.base.pooling}
        elif self._needs_grams:
            inputs |= {"items_per_domain": GRAM_ITEMS}
        if config.lora is not None:
            sections = config.model_dump(mode="json", include={"lora", "instruction", "text"})
            inputs |= {**sections, "seed": config.run.seed, "catalogs": self._catalog_digests()}
        key = {"schema": SCHEMA_VERSION, "method": self.method.method, "options": self.options, **inputs}
        return {**inputs, "digest": json_digest(key)}

    def _catalog_digests(self) -> dict[str, str]:
        catalogs, attributes = self.catalogs, self.config.text.attributes
        return {name: catalog_digest(catalogs[name], attributes) for name in self.taus if name in catalogs}

    def _merge_adapters(self, lora: LoraSection, report: Report) -> _Merged:
        from server.language.registry import METHODS, AdapterInputs

        started_s, table = time.monotonic(), adapter_tensors(self.base_folder, lora)
        for adapter in self.taus.values():
            check_adapter(adapter, table)
        domains = self.asking.domains(self.method.label) if self.asking is not None else None
        inputs = AdapterInputs(
            self.base_folder, lora, self.taus, self.catalogs, self.config, self.folder, report, domains
        )
        found = METHODS[self.method.method](inputs, self.options)
        check_adapter(found.adapter, table)
        return _Merged(found.adapter, time.monotonic() - started_s, found.coefficients, found.facts)

    @property
    def _needs_grams(self) -> bool:
        return (
            self.config.lora is None
            and self.method.method in methods()
            and methods()[self.method.method].needs == "grams"
        )

    def _merge(self, report: Report) -> _Merged:
        started_s, phase = time.monotonic(), f"merge {self.method.label}"
        report(phase=phase, step=0, total=1)
        grams = None
        if self._needs_grams:  # computed while it merges, layer by layer
            text, seed = self.config.text, self.config.run.seed
            grams = gram_matrices(
                self.base_folder, self.taus, self.catalogs, text, seed=seed, report=prefixed(report, phase)
            )
        vector = merge_tensors(self.method.method, self.taus, self.options, grams)
        report(phase=phase, step=1, total=1)
        return _Merged(vector, time.monotonic() - started_s)

    def _learn(self, report: Report) -> _Merged:
        own = ("granularity", "process")
        learned = learn(
            self.base_folder,
            self.taus,
            self.catalogs,
            objective=self.method.method,
            granularity=self.options["granularity"],
            learning=self.config.learning,
            text=self.config.text,
            work=self.folder,
            seed=self.config.run.seed,
            report=report,
            pooling=self.config.base.pooling,
            process=self.options["process"],
            process_options={key: value for key, value in self.options.items() if key not in own},
            cache=self.cache,
        )
        return _Merged(learned.vector, learned.seconds, learned.coefficients, learned.facts)

    def _flow_together(self, report: Report) -> _Merged:
        config = self.config
        merged = confluence(
            self.base_folder,
            self.taus,
            self.catalogs,
            ConfluenceOptions.model_validate(self.options),
            learning=config.learning,
            text=config.text,
            work=self.folder,
            cache=self.cache,
            seed=config.run.seed,
            report=report,
            pooling=config.base.pooling,
        )
        return _Merged(merged.vector, merged.seconds, merged.coefficients, merged.facts)

    def _choose(self, report: Report) -> _Merged:
        """Merge by every candidate, score each, and give the chosen one with the reasons."""
        started_s, config = time.monotonic(), self.config
        inputs = load_inputs(
            self.base_folder,
            self.taus,
            self.catalogs,
            config.learning,
            config.text,
            seed=config.run.seed,
            pooling=config.base.pooling,
        )
        judge = Judge(inputs, self.options["target"], self.cache, report)

        def merge(candidate: MergeMethod) -> MergeResult:
            work = self.folder / "candidates"
            return run_merge(
                candidate, self.base_folder, self.taus, self.catalogs, config, work, report, self.cache
            )

        candidates = parse_candidates(self.options["candidates"])
        scores = {label: judge.score(merge(candidate).vector) for label, candidate in candidates.items()}
        choice = pick(scores, self.options["margin"])
        chosen = merge(candidates[choice["chosen"]])
        if chosen.trajectory_path is not None:
            write_atomic(self.folder / TRAJECTORY_FILE, chosen.trajectory_path.read_bytes())
        return _Merged(chosen.vector, time.monotonic() - started_s, chosen.coefficients, choice)


def _check_adapter_method(method: MergeMethod) -> dict[str, Any]:
    from server.language.registry import METHODS

    if method.learning is not None:
        raise ConfigError(
            f"merge {method.label!r}: adapters have no pseudo-user learning section", next_step="remove it"
        )
    if method.method not in METHODS:
        raise unknown_name("merge method of adapters", method.method, METHODS)
    return METHODS[method.method].check(method.options)


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
    trajectory = folder / TRAJECTORY_FILE
    return MergeResult(
        label=record["label"],
        method=record["method"],
        options=record["options"],
        domains=record["domains"],
        vector=vector,
        coefficients=record["coefficients"],
        seconds=record["seconds"],
        trajectory_path=trajectory if record["coefficients"] and trajectory.is_file() else None,
        inputs=record["inputs"],
        resumed=resumed,
        facts=record.get("facts", {}),
    )
