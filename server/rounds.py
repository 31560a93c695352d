"""The rounds of one run in order: contribute, merge, evaluate, publish and install, report.

Each step looks first at what is on disk, so a new process goes on where a killed one stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.catalog import Catalog
from common.errors import FederationError
from common.files import write_atomic
from common.language.adapters import folder_digest
from common.ledger import Journal
from common.metrics import run_metrics
from common.models.base import resolve_base
from common.orders import EVALUATE, INSTALL, ROUND, SCORE, Candidate
from common.parcels import EVERYONE, SERVER, Codec, Kind, Parcel, code_version, draft, seal_parcel
from common.progress import StatusFile
from common.vectors import TaskVector, read_vector, write_vector
from server.asking import Asking, generations_of
from server.federation import Control, GridLike, Outcome, ask_for_metrics, contribute
from server.home import ServerHome
from server.merge import MergeResult, run_merge
from server.outliers import survey
from server.publishing import Provenance, publish, publish_merged
from server.results import VECTORS, write_results
from server.roots import keep_checkpoints
from server.runs import DONE, RUNNING, Run
from server.store import OpenRun

log = logging.getLogger(__name__)
WITHDRAWN = "withdrawn"


@dataclass(frozen=True)
class Inputs:
    """What the domains delivered, read back from the store: all that merging ever sees."""

    taus: dict[str, TaskVector]
    catalogs: dict[str, Catalog]
    vector_parcels: dict[str, Parcel]
    synthetic: frozenset[str]

    def check_standing(self, home: ServerHome) -> None:
        """Raise FederationError naming the domain whose vector was withdrawn meanwhile."""
        for domain, parcel in self.vector_parcels.items():
            if home.store.is_withdrawn(parcel.header.payload_digest):
                raise withdrawn_error(domain)


def execute(grid: GridLike, home: ServerHome, run: Run) -> None:
    """Work through `run` to its end. Raises IsthmusError; what is done by then is kept."""
    status = StatusFile(run.folder / "status.json", run=run.spec.run_id)
    control = Control(grid, home, run)
    journal = Journal(run.folder / "journal.jsonl")
    home.store.open_run(open_run(run))

    enter(home, run, journal, status, "contribute")
    outcome = without_withdrawn(home, run, contribute(control, home, run))
    journal.put("contributed", {"delivered": outcome.delivered, "lost": outcome.lost})

    enter(home, run, journal, status, "merge")
    survey_of(home, run)
    inputs = read_inputs(home, run, outcome.delivered)
    asking = Asking(control, home, run, journal, inputs.vector_parcels)
    merged = [
        run_merge(
            method,
            resolve_base(run.spec.config.base.model),
            inputs.taus,
            inputs.catalogs,
            run.spec.config,
            run.folder / "merges",
            status,
            asking=asking,
        )
        for method in run.spec.config.merge
    ]

    until_s = enter(home, run, journal, status, "evaluate")
    candidates = [_publish_vector(home, run, journal, result, Kind.CANDIDATE) for result in merged]
    evaluated = ask_for_metrics(control, home, run, EVALUATE, outcome.delivered, candidates, until_s)

    until_s = enter(home, run, journal, status, "install")
    chosen = next(result for result in merged if result.label == run.spec.config.publish)
    universal = publish_universal(home, run, journal, chosen, inputs)
    installed = ask_for_metrics(control, home, run, INSTALL, evaluated.delivered, [universal], until_s)

    enter(home, run, journal, status, "report")
    write_results(home, run, merged, _lost(outcome, evaluated, installed))
    finish(home, run, status)


def open_run(run: Run, **changes: Any) -> OpenRun:
    """What the server admits for `run`; `changes` are other fields of `OpenRun`."""
    generations = generations_of(run.spec.config, len(run.spec.members))
    facts: dict[str, Any] = {
        "run": run.spec.run_id,
        "base_digest": run.spec.base_digest,
        "domains": frozenset(run.spec.members),
        "tensors": {name: tuple(shape) for name, shape in run.spec.tensors.items()},
        "rounds": ROUND[SCORE] + generations if generations else ROUND[INSTALL] + 1,
        "metrics": frozenset(run_metrics(run.spec.config)),
        "max_norm": run.spec.config.run.max_norm,
    }
    opened = OpenRun(**{**facts, **changes})
    if not generations:
        return opened
    quota = {"kinds": opened.kinds | {Kind.FITNESS}, "quota_parcels": opened.quota_parcels + generations}
    return opened.model_copy(update=quota)


def without_withdrawn(home: ServerHome, run: Run, outcome: Outcome) -> Outcome:
    """`outcome` with every domain as lost whose admitted vector was withdrawn (from another run).

    Raises FederationError below the quorum.
    """
    gone = [domain for domain in outcome.delivered if is_withdrawn(home, run, domain)]
    delivered = [domain for domain in outcome.delivered if domain not in gone]
    if gone and len(delivered) < max(1, run.spec.quorum):
        raise withdrawn_error(gone[0])
    return Outcome(delivered, outcome.lost | dict.fromkeys(gone, WITHDRAWN))


def is_withdrawn(home: ServerHome, run: Run, domain: str) -> bool:
    """Whether the vector that `domain` delivered for `run` was withdrawn."""
    return home.store.is_withdrawn(admitted(home, run, Kind.TASK_VECTOR, domain).header.payload_digest)


def withdrawn_error(domain: str) -> FederationError:
    """Why a run cannot go on with this domain's vector."""
    return FederationError(
        f"{WITHDRAWN}: the vector of {domain} was withdrawn, and is never merged again",
        next_step="start a new run; with other data or another configuration it gives a new vector",
    )


def finish(home: ServerHome, run: Run, status: StatusFile) -> None:
    """Close a run whose results are written."""
    home.store.close_run(run.spec.run_id)
    keep_checkpoints(home)
    run.set_state(DONE, phase="done")
    status(phase="done", step=1, total=1)


def read_inputs(home: ServerHome, run: Run, domains: Iterable[str]) -> Inputs:
    """The admitted vectors and catalogs of `domains`. Raises FederationError where one was withdrawn."""
    expected = {name: tuple(shape) for name, shape in run.spec.tensors.items()}
    taus, catalogs, parcels, synthetic = {}, {}, {}, set()
    for domain in domains:
        vector = admitted(home, run, Kind.TASK_VECTOR, domain)
        if home.store.is_withdrawn(vector.header.payload_digest):
            raise withdrawn_error(domain)
        taus[domain] = read_vector(vector.payload, expected, run.spec.config.training.vector_codec)
        catalogs[domain] = Catalog.read(admitted(home, run, Kind.CATALOG, domain).payload)
        card = json.loads(admitted(home, run, Kind.DOMAIN_CARD, domain).payload.read_bytes())
        if card.get("synthetic"):
            synthetic.add(domain)
        parcels[domain] = vector
    return Inputs(taus, catalogs, parcels, frozenset(synthetic))


def survey_of(home: ServerHome, run: Run) -> dict[str, Any]:
    """Norms and cosines of the vectors that `run` merges (`server.outliers`), read once and kept.

    Raises FederationError before the run has its vectors.
    """
    path = run.folder / VECTORS
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    source, domains = home.runs.source(run), run.merged_domains
    if not domains:
        raise FederationError(f"{run.spec.run_id} has no vectors yet", next_step="isthmus run status")
    files = {domain: admitted(home, source, Kind.TASK_VECTOR, domain).payload for domain in domains}
    found = survey({domain: file for domain, file in files.items() if file.exists()})
    write_atomic(path, json.dumps(found, indent=1).encode())
    for domain, vector in found["vectors"].items():
        if vector["stands_out"]:
            log.warning("the vector of %s stands out: %s", domain, ", ".join(vector["stands_out"]))
    return found


def admitted(home: ServerHome, run: Run, kind: Kind, domain: str) -> Parcel:
    """What `domain` delivered for round 0 of `run`. Raises FederationError when it delivered none."""
    found = home.store.find(run=run.spec.run_id, kind=kind, sender=domain, round=0)
    parcel = home.store.get(found[-1].digest) if found else None
    if parcel is None:
        raise FederationError(f"{domain}: no admitted {kind} in the store", next_step="isthmus run status")
    return parcel


def _publish_vector(
    home: ServerHome, run: Run, journal: Journal, result: MergeResult, kind: Kind, model: str = ""
) -> Candidate:
    """Seal a merged vector and put it where the domains fetch it; the same one on every call."""
    key = f"published/{kind}/{result.label}"
    known = journal.get(key)
    if known is None:
        payload = _vector_file(run, result)
        header = draft(
            payload,
            kind=kind,
            run=run.spec.run_id,
            sender=SERVER,
            recipient=EVERYONE,
            base_digest=run.spec.base_digest,
            codec=Codec(run.spec.config.training.vector_codec),
            round=1 if kind is Kind.CANDIDATE else 2,
            checkpoint=home.ledger.tree_head(),
        )
        parcel = seal_parcel(header, payload, home.identity)
        home.store.publish(parcel)
        known = {"parcel": parcel.digest, **({"model_digest": model} if model else {})}
        journal.put(key, known)
    return Candidate(result.label, known["parcel"], model)


def _vector_file(run: Run, result: MergeResult) -> Path:
    path = run.folder / "merges" / result.label / "published.safetensors"
    if not path.exists():
        write_vector(path, result.vector, run.spec.config.training.vector_codec)
    return path


def publish_universal(
    home: ServerHome, run: Run, journal: Journal, chosen: MergeResult, inputs: Inputs
) -> Candidate:
    """The model folder for everybody, made from exactly the (quantised) vector that the domains get.

    Raises FederationError when one of its vectors was withdrawn meanwhile.
    """
    inputs.check_standing(home)
    config = run.spec.config
    folder = run.folder / "model"
    if not folder.exists():
        expected = {name: tuple(shape) for name, shape in run.spec.tensors.items()}
        published = read_vector(_vector_file(run, chosen), expected, config.training.vector_codec)
        pseudonyms = {domain: home.pseudonym(domain) for domain in inputs.taus}
        provenance = Provenance(
            run=run.spec.run_id,
            config=config,
            vectors={pseudonyms[name]: p.header.payload_digest for name, p in inputs.vector_parcels.items()},
            synthetic=frozenset(pseudonyms[name] for name in inputs.synthetic),
            code_version=code_version(),
        )
        base = resolve_base(config.base.model)
        named = pseudonymous(replace(chosen, vector=published), pseudonyms)
        if config.lora is not None and config.lora.publish_merged:
            publish_merged(base, named, provenance, run.folder / "merged")
        publish(base, named, provenance, folder)
    return _publish_vector(home, run, journal, chosen, Kind.UNIVERSAL_MODEL, folder_digest(folder))


def pseudonymous(result: MergeResult, pseudonyms: Mapping[str, str]) -> MergeResult:
    """The same merge with every domain called by its pseudonym, for what is published."""
    digests: dict[str, Any] = {
        key: {pseudonyms[name]: digest for name, digest in result.inputs[key].items()}
        for key in ("vectors", "catalogs")
        if key in result.inputs
    }
    return replace(
        result,
        domains=[pseudonyms[name] for name in result.domains],
        coefficients={
            group: {pseudonyms.get(name, name): value for name, value in row.items()}  # or a base spirit
            for group, row in result.coefficients.items()
        },
        inputs={**result.inputs, **digests},
    )


def enter(home: ServerHome, run: Run, journal: Journal, status: StatusFile, phase: str) -> float:
    """Begin a phase, or go on with it; Unix seconds after which it waits no longer for every domain."""
    log.info("%s: %s", run.spec.run_id, phase)
    fact = journal.get(f"phase/{phase}") or {"time_s": round(time.time(), 2)}
    journal.put(f"phase/{phase}", fact)
    keep_checkpoints(home)
    run.set_state(RUNNING, phase=phase)
    status(phase=phase)
    return float(fact["time_s"]) + 60.0 * run.spec.config.run.deadline_minutes


def _lost(*outcomes: Outcome) -> dict[str, str]:
    return {domain: why for outcome in outcomes for domain, why in outcome.lost.items()}
