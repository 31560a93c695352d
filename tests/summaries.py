"""A run's summary and events, as the server would write them, without a run."""

from __future__ import annotations

import math
from typing import Any

from server.results import owners_say, tables

MARKED = "norm:layer-3"
DOMAINS = ("kitchen", "music", "toys")
LOST = "garden"
GROUPS = [*(f"layer-{n}" for n in range(12)), "rest"]
LABELS = ["weight-averaging", "ties", "adamerging-domain", "mergerec-layer"]


def levels(ndcg: dict[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> domain -> metrics, each domain a little harder than the last."""
    return {
        row: {
            name: {"ndcg@10": value / (i + 1), "recall@10": 1.8 * value / (i + 1)}
            for i, name in enumerate(DOMAINS)
        }
        for row, value in ndcg.items()
    }


def make_summary() -> dict[str, Any]:
    results = levels(
        {
            "zero-shot": 0.051,
            "fine-tuned": 0.104,
            "weight-averaging": 0.082,
            "ties": 0.085,
            "adamerging-domain": 0.0871,
            "mergerec-layer": 0.0987,
            "universal": 0.0986,
            "joint": 0.109,
        }
    )
    vector = {
        "parcel": "ab" * 32,
        "payload_digest": "cd" * 32,
        "bytes": 21_385_112,
        "training": {"steps": 300},
    }
    domains = {
        name: {
            "pseudonym": f"owner-{i}",
            "delivered": True,
            "lost": "",
            "catalog_items": 4000,
            "vector": vector,
        }
        for i, name in enumerate(DOMAINS)
    }
    domains[LOST] = {
        "pseudonym": "owner-9",
        "delivered": False,
        "lost": "deadline",
        "catalog_items": 0,
        "vector": None,
    }
    crossed = {
        "in": {"task-vector": {"count": 1, "bytes": 21_385_112}, "catalog": {"count": 1, "bytes": 812_332}},
        "out": {
            "candidate": {"count": 7, "bytes": 149_000_000},
            "universal-model": {"count": 1, "bytes": 21_300_000},
        },
    }
    final = {g: {d: 0.2 + 0.01 * i * j for j, d in enumerate(DOMAINS)} for i, g in enumerate(GROUPS)}
    merges: dict[str, Any] = {
        label: {"method": label.split("-")[0], "coefficients": {}, "seconds": 3.2, "trajectory": ""}
        for label in LABELS
    }
    merges["weight-averaging"]["method"] = "weight-averaging"
    merges["adamerging-domain"]["coefficients"] = {"all": dict.fromkeys(DOMAINS, 0.31)}
    merges["mergerec-layer"]["coefficients"] = final
    entries: list[dict[str, Any]] = [{"method": "weight-averaging"}, {"method": "ties"}]
    entries += [{"method": "adamerging", "options": {"granularity": "domain"}}]
    entries += [{"method": "mergerec", "options": {"granularity": "layer"}}]
    return {
        "schema": 1,
        "run": {
            "id": "r-7f3a",
            "name": "three-shops",
            "seed": 0,
            "created_s": 1.7e9,
            "finished_s": 1.7e9 + 900,
        },
        "synthetic": True,
        "config": {
            "run": {"name": "three-shops", "quorum": 3},
            "merge": entries,
            "publish": "mergerec-layer",
        },
        "base": {"model": "embedded", "digest": "ef" * 32},
        "domains": domains,
        **tables(results),
        "merges": merges,
        "published": {
            "label": "mergerec-layer",
            "model_digest": "12" * 32,
            "folder": "model",
            "parcel": "34" * 32,
            "owners_say": owners_say(results, LABELS, "mergerec-layer"),
        },
        "vectors": {
            "vectors": {
                name: {
                    "norm": 1.5,
                    "norm_score": 4.25,
                    "cosine_to_others": 0.31,
                    "cosine_score": None,
                    "stands_out": [MARKED] if name == "toys" else [],
                }
                for name in DOMAINS
            },
            "cosines": {a: {b: 1.0 if a == b else 0.125 for b in DOMAINS} for a in DOMAINS},
            "note": "a mark is a reason to look",
        },
        "leave_one_out": {
            "probes": dict.fromkeys(DOMAINS, 64),
            "without": {
                "toys": {"change": {"kitchen": 0.0312, "music": -0.002}, "agreement": {"kitchen": 0.871}}
            },
            "note": "told from the public catalogs",
        },
        "crossings": dict.fromkeys(DOMAINS, crossed),
        "seconds": {"contribute": 412.3, "merge": 301.2, "evaluate": 61.7, "install": 20.4, "total": 801.0},
        "processes": {"server": {"peak_memory_bytes": 1_912_000_000, "cpu_s": 512.3}},
    }


def make_events() -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for step in range(301):
        ease = 1 - math.exp(-step / 90)
        loss = None if step == 0 else 1.2 - 0.5 * ease + 0.05 * math.sin(step)
        table = {g: {d: 0.2 + 0.1 * ease * (j - 0.5) for j, d in enumerate(DOMAINS)} for g in GROUPS}
        for merge, coefficients in (("mergerec-layer", table), ("adamerging-domain", {"all": table["rest"]})):
            events.append(
                {
                    "type": "coefficients",
                    "merge": merge,
                    "step": step,
                    "loss": loss,
                    "coefficients": coefficients,
                }
            )
    return events
