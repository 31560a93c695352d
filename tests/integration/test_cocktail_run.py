"""A whole run whose adapters become a cocktail on pseudo-users' prompts: merged, installed, reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from localgrid import LocalFederation

from clients.data.domain import Domain
from clients.personal import interpolate, personal_model
from clients.serving import current, recommend
from common.config import MergeMethod
from common.language.adapters import adapter_digest, load_adapter
from server import rounds
from server.cli import create_run
from server.federation import Control
from server.rounds import execute
from tests.integration.test_language_rounds import language_run
from tests.unit.language.conftest import build_causal

QUICK = {"prompts": 4, "steps": 2, "batch_size": 2, "learning_rate": 0.1, "evaluate_every_steps": 1}


def test_a_run_publishes_a_cocktail(
    tmp_path: Path, make_domain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "Control", partial(Control, sleep_s=0.0))
    base = build_causal(tmp_path / "base", "llama")
    merge = tuple(
        MergeMethod(method=method, options={**QUICK, **options})
        for method, options in (("cocktail", {"spirit": "product"}), ("mergerec", {}))
    )
    config = language_run(base).model_copy(update={"merge": merge, "publish": "cocktail"})
    with LocalFederation(tmp_path / "federation", base, make_domain) as federation:
        run = create_run(federation.server(), config)
        execute(federation.grid(), federation.server(), run)
        assert run.state["state"] == "done"
        published = run.folder / "model"
        for domain in federation.domains:
            installed = current(federation.path(domain))
            assert installed is not None and installed.name == adapter_digest(published)
        home, domain = federation.path("toys"), Domain.load(federation.folder / "data" / "toys")
        personal = interpolate(home, domain)
        folder, kept = personal_model(home)
        assert kept == personal and personal.universal_digest == adapter_digest(published)
        entropies = {share: found["entropy"] for share, found in personal.metrics.items()}
        assert entropies[f"{personal.own_share:g}"] <= entropies["0.5"]
        assert len(recommend(folder, domain, domain.item_ids[:2], 2)) == 2
        pseudonyms = [federation.server().pseudonym(domain) for domain in federation.domains]
        texts = [path.read_text() for path in published.iterdir() if path.suffix in (".md", ".json")]
        assert not any(domain in text for domain in federation.domains for text in texts)
    assert load_adapter(published)[0] == config.lora
    named = json.loads((published / "merge.json").read_text())["coefficients"]["all"]
    assert set(named) == {"base spirit", *pseudonyms} and sum(named.values()) == pytest.approx(1, abs=1e-6)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert {"universal", "cocktail", "mergerec"} <= set(summary["results"])
    assert set(summary["merges"]["cocktail"]["facts"]["held_back_loss"]["alone"]) == {
        "base spirit",
        *federation.domains,
    }
    page = (run.folder / "report.html").read_text()
    assert page.count("<title>base spirit</title>") == 1
    assert page.count("Coefficient by step") == 4  # a caption and a label for each of the two merges
