"""A whole run whose adapters are merged by evolution on prompts of pseudo-users: published and installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from localgrid import LocalFederation

from clients.serving import current
from common.config import MergeMethod
from common.language.adapters import adapter_digest, load_adapter
from server import rounds
from server.cli import create_run
from server.federation import Control
from server.rounds import execute
from tests.integration.test_language_rounds import language_run
from tests.unit.language.conftest import build_causal

QUICK = {"prompts": 2, "ratio_iterations": 1, "scale_iterations": 1, "population": 4}


def test_a_run_publishes_what_evolution_found(
    tmp_path: Path, make_domain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "Control", partial(Control, sleep_s=0.0))
    base = build_causal(tmp_path / "base")
    merge = (MergeMethod(method="evo-merging", options=dict(QUICK)),)
    config = language_run(base).model_copy(update={"merge": merge, "publish": "evo-merging"})
    with LocalFederation(tmp_path / "federation", base, make_domain) as federation:
        run = create_run(federation.server(), config)
        execute(federation.grid(), federation.server(), run)
        assert run.state["state"] == "done"
        published = run.folder / "model"
        for domain in federation.domains:
            installed = current(federation.path(domain))
            assert installed is not None and installed.name == adapter_digest(published)
        texts = [path.read_text() for path in published.iterdir() if path.suffix in (".md", ".json")]
        assert not any(domain in text for domain in federation.domains for text in texts)
        pseudonyms = {federation.server().pseudonym(domain) for domain in federation.domains}
    assert load_adapter(published)[0] == config.lora
    coefficients = json.loads((published / "merge.json").read_text())["coefficients"]
    assert set(coefficients) == {"ratios", "scales"}
    assert all(set(row) == pseudonyms for row in coefficients.values())
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["merges"]["evo-merging"]["facts"]["evaluations"] == 10
