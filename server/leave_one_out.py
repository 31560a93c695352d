"""What each vector does to the merged model, told without any private data: leave it out and look again.

For every domain the run's published merge is made once more from the vectors of the others, and both models
rank the same probes: held-back pseudo-users of every public catalog (`server.learning.choose.Judge`).

    agreement   NDCG@10 of the model without the vector, where the model with all of them is right: 1 where
                their best 10 are the same
    change      what leaving the vector out adds to the NDCG@10 against the teacher of the catalog's own
                domain; above 0, that catalog is served better without the vector

Leaving out any vector leaves a larger share to the others, so their catalogs gain a little in every row. A
vector that hurts shows as a gain in others' catalogs that is larger than in the other rows. A backdoor that
answers to items which are no probe changes nothing here: this never shows that a model has none.

One merge a domain, each journaled, so it goes on where it was interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.digests import json_digest
from common.errors import FederationError
from common.files import write_atomic
from common.models.base import resolve_base
from common.progress import NO_REPORT, Report
from server.home import ServerHome
from server.learning.choose import Judge, agreement, gains, mean
from server.learning.prepare import load_inputs
from server.merge import run_merge
from server.results import put_leave_one_out
from server.rounds import Inputs, is_withdrawn, read_inputs
from server.runs import DONE, Run

HOLDOUT = 0.1  # of each catalog, where the run's learning holds nothing back
NOTE = (
    "What leaving a vector out adds to the NDCG@10 against the teacher of each catalog's own domain, on "
    "pseudo-users of the public catalogs, and how much of the best 10 stays the same. Without any one vector "
    "the others weigh more, so compare the rows, not the signs; differences below about 0.02 are within what "
    "so few probes can tell. This does not show that a model has no backdoor."
)


def leave_one_out(home: ServerHome, run: Run, report: Report = NO_REPORT) -> dict[str, Any]:
    """Evaluate `run` without each of its vectors; kept in `leave-one-out.json` and `summary.json`.

    Raises FederationError when the run is not done, has fewer than two vectors, or one was withdrawn.
    """
    inputs = _inputs(home, run)
    domains, path = sorted(inputs.taus), run.folder / "leave-one-out.json"
    vectors = {domain: parcel.header.payload_digest for domain, parcel in inputs.vector_parcels.items()}
    digest = json_digest({"vectors": vectors, "config": run.spec.config.model_dump(mode="json")})
    found = _read(path, digest)
    left = [domain for domain in domains if domain not in found["without"]]
    if left:
        judge = _judge(run, inputs, report)
        full = judge.rank(_merge(run, inputs, domains, run.folder / "merges", report))
        found |= {"probes": judge.probes, "all": judge.grade(full)}
    for number, domain in enumerate(left):
        report(phase="leave one out", step=len(domains) - len(left) + number, total=len(domains))
        others = [name for name in domains if name != domain]
        ranked = judge.rank(_merge(run, inputs, others, run.folder / "leave-one-out" / domain, report))
        score = judge.grade(ranked)
        found["without"][domain] = {
            "agreement": {c: mean(agreement(s, gains(full[c]))) for c, s in ranked.items()},
            "score": score,
            "change": {catalog: score[catalog] - found["all"][catalog] for catalog in score},
        }
        write_atomic(path, json.dumps(found, indent=1).encode())
    report(phase="leave one out", step=len(domains), total=len(domains))
    put_leave_one_out(run, found)
    return found


def estimate_s(run: Run) -> float:
    """Seconds that the merges alone may take, from the published one's; 0 where that is not known."""
    merged = len(run.merged_domains)
    try:
        path = run.folder / "merges" / run.spec.config.publish / "merge.json"
        return merged * float(json.loads(path.read_text(encoding="ascii"))["seconds"])
    except (OSError, ValueError, KeyError):
        return 0.0


def _inputs(home: ServerHome, run: Run) -> Inputs:
    source, domains = home.runs.source(run), run.merged_domains
    if run.spec.config.lora is not None:
        raise FederationError(
            f"{run.spec.run_id} merges adapters, and the probes are of encoders",
            next_step="merge anew without a vector: isthmus run withdraw, or a run without its owner",
        )
    if run.state["state"] != DONE or len(domains) < 2:
        raise FederationError(
            f"{run.spec.run_id} is not a finished run of two vectors or more",
            next_step="isthmus run list",
        )
    for domain in domains:
        if is_withdrawn(home, source, domain):
            raise FederationError(
                f"withdrawn: the vector of {domain} in {run.spec.run_id} is never merged again",
                next_step="name the run that published without it: isthmus run list",
            )
    return read_inputs(home, source, domains)


def _judge(run: Run, inputs: Inputs, report: Report) -> Judge:
    config = run.spec.config
    learning = config.learning
    if not learning.holdout:
        learning = learning.model_copy(update={"holdout": HOLDOUT})
    base = resolve_base(config.base.model)
    loaded = load_inputs(
        base,
        inputs.taus,
        inputs.catalogs,
        learning,
        config.text,
        seed=config.run.seed,
        pooling=config.base.pooling,
    )
    return Judge(loaded, "own", run.folder / "merges" / "embeddings", report)


def _merge(run: Run, inputs: Inputs, domains: list[str], work: Path, report: Report) -> Any:
    """The published merge of these domains' vectors, from its journal where it was made before."""
    config = run.spec.config
    method = next(method for method in config.merge if method.label == config.publish)
    return run_merge(
        method,
        resolve_base(config.base.model),
        {domain: inputs.taus[domain] for domain in domains},
        {domain: inputs.catalogs[domain] for domain in domains},
        config,
        work,
        report,
        run.folder / "merges" / "embeddings",
    ).vector


def _read(path: Path, digest: str) -> dict[str, Any]:
    """What an interrupted evaluation of the same vectors has found, or a beginning."""
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        found = {}
    return found if found.get("inputs") == digest else {"inputs": digest, "without": {}, "note": NOTE}
