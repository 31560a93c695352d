"""A run's summary and events as the report reads them: strict on schema, lenient on what is absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.config import MergeMethod
from common.errors import DataError
from common.parcels import Kind

SCHEMA_VERSION = 1

Json = dict[str, Any]


def part(tree: Json, *path: str) -> Json:
    """The mapping at `path`, empty where there is none."""
    for key in path:
        found = tree.get(key)
        tree = found if isinstance(found, dict) else {}
    return tree


def domain_names(summary: Json) -> list[str]:
    """Every domain that took part or returned figures, in the order of names (of columns and colours)."""
    results = part(summary, "results")
    return sorted({*part(summary, "domains"), *(d for row in results for d in part(results, row))})


def metrics(summary: Json) -> list[str]:
    """Every metric that anybody returned: NDCG, recall, then the rest."""
    results = part(summary, "results")
    names = {m for row in results for d in part(results, row) for m in part(results, row, d)}
    return sorted(names, key=lambda m: (not m.startswith("ndcg"), not m.startswith("recall"), m))


def metric_name(metric: str) -> str:
    """As papers write it: NDCG@10."""
    return metric.replace("ndcg", "NDCG").replace("recall", "Recall")


def merge_order(summary: Json) -> list[str]:
    """The labels of all merges, as configured."""
    entries = part(summary, "config").get("merge")
    labels = [
        MergeMethod.model_construct(**entry).label
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and "method" in entry
    ]
    merges = part(summary, "merges")
    return sorted(merges, key=lambda m: (labels.index(m) if m in labels else len(labels), m))


def row_order(summary: Json) -> list[str]:
    """The rows of the results: yardsticks, merges as configured, universal, joint."""
    found, merges = part(summary, "results"), merge_order(summary)
    first, last = ["zero-shot", "fine-tuned"], ["universal", "joint"]
    others = sorted(set(found) - {*first, *merges, *last})
    return [row for row in [*first, *merges, *others, *last] if row in found]


def groups(coefficients: Json) -> dict[str, Json]:
    """Group -> domain -> number; a plain domain -> number is the one group `all`."""
    found = {name: row for name, row in coefficients.items() if isinstance(row, dict)}
    return found or ({"all": coefficients} if coefficients else {})


def group_order(group: str) -> tuple[bool, int, str]:
    """Layers by their number, then the rest."""
    end = group.rpartition("-")[2]
    return (not end.isdigit(), int(end) if end.isdigit() else 0, group)


def kind_order(kind: str) -> tuple[int, str]:
    """In the order of `Kind`, unknown ones last."""
    kinds = [str(known) for known in Kind]
    return (kinds.index(kind) if kind in kinds else len(kinds), kind)


def read_summary(path: Path) -> Json:
    """Raises DataError when the file is missing, damaged or of another schema."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise DataError(
            f"{path}: no summary to read: {err}", next_step="finish the run, or copy the file again"
        ) from err
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA_VERSION:
        raise DataError(
            f"{path}: not a summary of schema {SCHEMA_VERSION}", next_step="use the version that wrote it"
        )
    return summary


def read_events(path: Path) -> list[Json]:
    """Every whole line; none when there is no file."""
    events = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if isinstance(event, dict):
            events.append(event)
    return events
