"""`isthmus simulate` with adapters of a tiny Llama: real processes, an audit, a recommendation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shores import RUN_S, Federation, read_json, synthetic, write_toml

from tests.unit.language.conftest import build_causal

DOMAINS = ("garden", "kitchen")
ROWS = ["zero-shot", "fine-tuned", "factors", "product", "evo-merging", "universal"]

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]


def language_simulation(base: Path) -> dict[str, Any]:
    """Six steps; three merges, one of which asks the domains."""
    return {
        "run": {"name": "language"},
        "base": {"model": str(base)},
        "text": {"attributes": ["title"]},
        "training": {
            "batch_size": 8, "max_steps": 6, "warmup_steps": 1, "learning_rate": 1e-2, "precision": "fp32",
            "eval_every_steps": 3, "checkpoint_every_steps": 2, "validation_users": 10,
        },
        "lora": {"rank": 2, "alpha": 4, "modules": ["q_proj", "v_proj"], "publish_merged": True},
        "instruction": {"candidates": 5, "history_items": 4, "generated_users": 4},
        "merge": [
            {"method": "factors"},
            {"method": "product"},
            {
                "method": "evo-merging",
                "options": {
                    "fitness": "domains", "ratio_iterations": 1, "scale_iterations": 1, "population": 4,
                },
            },
        ],
        "policy": {
            "kinds": ["domain-card", "catalog", "task-vector", "metrics", "revocation", "fitness"],
            "share_adapter": True, "answers": {"min_users": 10},
        },
        "publish": "product",
        "domain": [{"name": name, "path": name, "users": 60} for name in DOMAINS],
    }  # fmt: skip


def test_adapters_cross_merge_and_recommend(federation: Federation, tmp_path: Path) -> None:
    folder, out = federation.folder / "given", federation.folder / "out"
    for name in DOMAINS:
        synthetic(name, users=120).save(folder / name)
    base = build_causal(tmp_path / "llama", "llama")
    config = write_toml(folder / "language.toml", language_simulation(base))
    federation.ok("simulate", config, "--out", out, patience_s=RUN_S)

    summary = read_json(out / "summary.json")
    assert list(summary["results"]) == ROWS
    for row in summary["results"].values():
        assert set(row) == set(DOMAINS)
        assert all({"ndcg@1", "ndcg@3", "recall@3", "valid-answers"} <= set(found) for found in row.values())
    sent = [facts["in"]["task-vector"]["bytes"] for facts in summary["crossings"].values()]
    assert all(bytes_ < 40_000 for bytes_ in sent)  # the base has 110 KB in float32
    assert {path.name for path in (out / "model").iterdir()} >= {"adapter_config.json", "README.md"}
    (run,) = (out / "server" / "runs").iterdir()
    assert (run / "merged" / "model.safetensors").is_file()

    assert all(facts["in"]["fitness"]["count"] == 4 for facts in summary["crossings"].values())

    home = out / "domains" / "garden"
    item = json.loads(federation.ok("client", "recommend", "--home", home, "--history", first_item(folder),
                                    "-k", "2", "--json", "--explain", "--compare"))  # fmt: skip
    assert len(item["universal"]) == len(item["own"]) == 2
    assert set(item["explanations"]) == {"universal", "own"}

    bundle, root = out / "audit", out / "server" / "root.json"
    federation.ok("audit", "bundle", out, "--out", bundle)
    federation.ok("audit", "verify", bundle, "--root", root)


def first_item(folder: Path) -> str:
    from clients.data.domain import Domain

    return Domain.load(folder / "garden").item_ids[0]
