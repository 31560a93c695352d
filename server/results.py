"""The folder of results: `summary.json`, `metrics.jsonl` and `report.html` of one run.

Everything here is derived from what is on disk: admitted metrics parcels, merges, ledger. The schema is
`docs/summary-schema.md`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.files import write_atomic
from common.ledger import Journal
from common.parcels import Kind, Parcel
from common.payloads import decode_values
from server.home import ServerHome
from server.merge import MergeResult
from server.report import write_report
from server.reporting.data import read_summary
from server.runs import Run

ZERO_SHOT, FINE_TUNED, UNIVERSAL = "zero-shot", "fine-tuned", "universal"
VECTORS = "vectors.json"
Table = dict[str, dict[str, dict[str, float]]]  # row -> domain -> metric -> value


def write_results(home: ServerHome, run: Run, merged: Sequence[MergeResult], lost: Mapping[str, str]) -> None:
    """Write all three files; the same input gives the same files but for the finishing time."""
    summary = summarise(home, run, merged, lost)
    save(run.folder, summary, [*_phases(run), *_trajectories(run, merged)])


def save(folder: Path, summary: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> None:
    """Write the three files of `summary` and `events` into `folder`."""
    lines = [*events, *_result_events(summary["results"])]
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1).encode())
    write_atomic(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_report(folder)


def summarise(
    home: ServerHome, run: Run, merged: Sequence[MergeResult], lost: Mapping[str, str]
) -> dict[str, Any]:
    """The summary of a run as the server may know it."""
    spec, source = run.spec, home.runs.source(run)
    results = read_metrics(home, run)
    vectors = {parcel.header.sender: parcel for parcel in _parcels(home, source, Kind.TASK_VECTOR)}
    if spec.withdrawal is not None:
        results = _yardsticks(home, source, spec.members) | results
        lost = {spec.withdrawal.domain: "withdrawn", **lost}
    domains = {}
    synthetic = False
    for domain in source.spec.members:
        card = _card(home, source, domain)
        synthetic = synthetic or bool(card.get("synthetic"))
        vector = vectors.get(domain)
        domains[domain] = {
            "pseudonym": home.pseudonym(domain),
            "delivered": vector is not None and domain not in lost,
            "lost": lost.get(domain, ""),
            "catalog_items": card.get("items", 0),
            "vector": None
            if vector is None
            else {
                "parcel": vector.digest,
                "payload_digest": vector.header.payload_digest,
                "bytes": vector.header.payload_bytes,
                "training": dict(vector.header.training),
            },
        }
    published = Journal(run.folder / "journal.jsonl").get(
        f"published/{Kind.UNIVERSAL_MODEL}/{spec.config.publish}"
    )
    return {
        "schema": 1,
        "run": {
            "id": spec.run_id,
            "name": spec.config.run.name,
            "seed": spec.config.run.seed,
            "created_s": spec.created_s,
            "finished_s": int(time.time()),
            "state": "done",
        },
        "withdrawal": None if spec.withdrawal is None else asdict(spec.withdrawal),
        "synthetic": synthetic,
        "config": spec.config.model_dump(mode="json"),
        "base": {"model": spec.config.base.model, "digest": spec.base_digest},
        "domains": domains,
        **tables(results),
        "merges": {
            result.label: {
                "method": result.method,
                "coefficients": result.coefficients,
                "seconds": round(result.seconds, 2),
                "facts": result.facts,
                "trajectory": _relative(result.trajectory_path, run.folder),
            }
            for result in merged
        },
        "published": {
            "label": spec.config.publish,
            "folder": "model",
            **(published or {}),
            "owners_say": owners_say(results, [result.label for result in merged], spec.config.publish),
        },
        "vectors": _read_json(run.folder / VECTORS),
        "crossings": crossings(home, spec.run_id),
        "seconds": _phase_seconds(run),
        "processes": _read_json(home.path / "processes.json"),
    }


def owners_say(results: Table, labels: Sequence[str], published: str) -> dict[str, Any] | None:
    """Whether the metrics that owners allowed confirm the merge that was published.

    `average`: NDCG, normalised (fine-tuned = 100), of each merge over the domains that measured all of them;
    `best` of these, by how many points the published merge is `behind` it, and the domains whose own model
    it is below. None where nothing can be compared.
    """
    scaled = tables(results)["normalised"]
    metric = next((name for row in scaled.values() for d in row.values() for name in d if "ndcg" in name), "")
    rows = {label: scaled.get(label, {}) for label in labels}
    domains = [d for d in rows.get(published, {}) if all(metric in row.get(d, {}) for row in rows.values())]
    if not domains:
        return None
    average = {label: sum(row[d][metric] for d in domains) / len(domains) for label, row in rows.items()}
    best = max(average, key=lambda label: (average[label], label == published))
    return {
        "metric": metric,
        "domains": len(domains),
        "average": average,
        "best": best,
        "behind": average[best] - average[published],
        "below_own": [domain for domain in domains if rows[published][domain][metric] < 100.0],
    }


def put_leave_one_out(run: Run, found: Mapping[str, Any]) -> None:
    """Add a leave-one-out evaluation to the results of a finished run."""
    _rewrite(run, {**read_summary(run.folder / "summary.json"), "leave_one_out": found})


def _rewrite(run: Run, summary: Mapping[str, Any]) -> None:
    write_atomic(run.folder / "summary.json", json.dumps(summary, indent=1).encode())
    write_report(run.folder)


def amend_results(home: ServerHome, run: Run, domain: str, withdrawal: Run) -> None:
    """Say in the results of a finished run that a domain's vector was withdrawn, and by which run."""
    summary = read_summary(run.folder / "summary.json")
    summary["domains"][domain]["withdrawn"] = withdrawal.spec.run_id
    summary["crossings"] = crossings(home, run.spec.run_id)
    _rewrite(run, summary)


def _yardsticks(home: ServerHome, source: Run, domains: Iterable[str]) -> Table:
    """What the domains' own and the base model reached in the run whose vectors are merged again."""
    found, kept = read_metrics(home, source), set(domains)
    return {
        row: {domain: values for domain, values in found.get(row, {}).items() if domain in kept}
        for row in (ZERO_SHOT, FINE_TUNED)
    }


def tables(results: Table) -> dict[str, Any]:
    """`results`, `normalised` (fine-tuned = 100) and `average` from row -> domain -> metric -> value."""
    own = results.get(FINE_TUNED, {})
    normalised: Table = defaultdict(dict)
    for row, by_domain in results.items():
        for domain, metrics in by_domain.items():
            scaled = {
                metric: 100.0 * value / own[domain][metric]
                for metric, value in metrics.items()
                if own.get(domain, {}).get(metric, 0.0) > 0.0
            }
            if scaled:
                normalised[row][domain] = scaled
    average = {
        row: {"results": _mean(results[row].values()), "normalised": _mean(normalised.get(row, {}).values())}
        for row in results
    }
    return {"results": results, "normalised": dict(normalised), "average": average}


def read_metrics(home: ServerHome, run: Run) -> Table:
    """Every admitted metrics parcel of the run as row -> domain -> metric -> value."""
    results: Table = defaultdict(dict)
    for parcel in _parcels(home, run, Kind.METRICS):
        for name, value in decode_values(parcel.payload.read_bytes()).items():
            row, _, metric = name.rpartition("/")
            results[row].setdefault(parcel.header.sender, {})[metric] = float(value)
    order = [ZERO_SHOT, FINE_TUNED, *(method.label for method in run.spec.config.merge), UNIVERSAL]
    return {
        row: results[row]
        for row in sorted(results, key=lambda r: order.index(r) if r in order else len(order))
    }


def crossings(home: ServerHome, run_id: str) -> dict[str, Any]:
    """Count and bytes of what crossed, from the server's ledger: domain -> in/out -> kind."""
    home.ledger.refresh()
    table: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for entry in home.ledger:
        body = entry.body
        if body["run"] != run_id or body["type"] == "receipt":
            continue
        cell = table.setdefault(body["peer"], {}).setdefault(body["direction"], {})
        count = cell.setdefault(body["kind"], {"count": 0, "bytes": 0})
        count["count"] += 1
        count["bytes"] += body["size_bytes"]
    return table


def _mean(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for metric, value in row.items():
            values[metric].append(value)
    return {metric: sum(found) / len(found) for metric, found in values.items()}


def _card(home: ServerHome, run: Run, domain: str) -> dict[str, Any]:
    found = [parcel for parcel in _parcels(home, run, Kind.DOMAIN_CARD) if parcel.header.sender == domain]
    return dict(json.loads(found[-1].payload.read_bytes())) if found else {}


def _parcels(home: ServerHome, run: Run, kind: Kind) -> list[Parcel]:
    """Every admitted parcel of this kind."""
    found = (home.store.get(record.digest) for record in home.store.find(run=run.spec.run_id, kind=kind))
    return [parcel for parcel in found if parcel is not None]


def _phases(run: Run) -> list[dict[str, Any]]:
    journal = Journal(run.folder / "journal.jsonl")
    facts = [(key.removeprefix("phase/"), fact) for key, fact in journal.items("phase/")]
    return sorted(
        ({"type": "phase", "phase": phase, "time_s": fact["time_s"]} for phase, fact in facts),
        key=lambda event: event["time_s"],
    )


def _phase_seconds(run: Run) -> dict[str, float]:
    phases = _phases(run)
    ends = [event["time_s"] for event in phases[1:]]
    return {
        event["phase"]: round(end_s - event["time_s"], 2)
        for event, end_s in zip(phases, ends, strict=False)
        if event["phase"] != "report"
    }


def _trajectories(run: Run, merged: Sequence[MergeResult]) -> list[dict[str, Any]]:
    events = []
    for result in merged:
        if result.trajectory_path is None:
            continue
        for line in result.trajectory_path.read_text(encoding="utf-8").splitlines():
            events.append({"type": "coefficients", "merge": result.label, **json.loads(line)})
    return events


def _result_events(results: Table) -> list[dict[str, Any]]:
    return [
        {"type": "result", "row": row, "domain": domain, "metrics": metrics}
        for row, by_domain in results.items()
        for domain, metrics in by_domain.items()
    ]


def _relative(path: Path | None, folder: Path) -> str:
    return "" if path is None else str(path.relative_to(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
