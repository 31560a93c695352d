"""The personal model: between the universal one and the domain's own, and never worse on validation users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from clients.cli import app
from clients.home import ClientConfig, ClientHome, ServerAddress
from clients.personal import interpolate, personal_model
from clients.policy import write_policy
from clients.serving import current_or_fail, install, own_model, recommend, set_own_model, settings_of
from clients.training.evaluate import evaluate
from clients.training.fit import load_encoder
from common.config import RunConfig
from common.errors import BaseMismatchError, ConfigError, ModelError
from common.models.base import load_tensors, model_digest, save_model, trainable_tensors

CONFIG = RunConfig.model_validate({"text": {"attributes": ["title"], "max_seq_len": 24}})


def moved(base: Path, folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_tensors(base, trainable_tensors(base))
    noisy = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_model(base, noisy, folder, readme="")
    return folder


@pytest.fixture
def home(pico_model: Path, tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    path = tmp_path / "home"
    install(path, moved(pico_model, tmp_path / "published", 1), pico_model, config=CONFIG)
    set_own_model(path, moved(pico_model, tmp_path / "own", 2), CONFIG)
    return path


def validation(folder: Path, domain: Any) -> float:
    encoder = load_encoder(folder, CONFIG, training=False)
    return evaluate(encoder, domain, CONFIG, "valid").metrics["ndcg@10"]


def test_the_best_share_wins_and_its_model_is_kept(home: Path, pico_domain: Any) -> None:
    found = interpolate(home, pico_domain)
    scores = {float(share): metrics["ndcg@10"] for share, metrics in found.metrics.items()}
    assert scores[0.0] == pytest.approx(validation(current_or_fail(home), pico_domain))
    assert scores[1.0] == pytest.approx(validation(own_model(home), pico_domain))
    assert scores[found.own_share] == max(scores.values())
    assert found.own_share == min(share for share, score in scores.items() if score == max(scores.values()))
    folder, record = personal_model(home)
    assert record == found
    assert validation(folder, pico_domain) == pytest.approx(scores[found.own_share])
    universal, own = load_tensors(current_or_fail(home)), load_tensors(own_model(home))
    for name, tensor in load_tensors(folder).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, universal[name].lerp(own[name], found.own_share))
    assert settings_of(folder) == CONFIG


@pytest.mark.parametrize(("share", "end"), [(0.0, "universal"), (1.0, "own")])
def test_the_ends_are_the_models_themselves(home: Path, pico_domain: Any, share: float, end: str) -> None:
    interpolate(home, pico_domain, shares=[share])
    whole = {"universal": current_or_fail(home), "own": own_model(home)}[end]
    assert model_digest(personal_model(home)[0]) == model_digest(whole)


def test_only_the_personal_folder_changes(home: Path, pico_domain: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    interpolate(home, pico_domain)
    interpolate(home, pico_domain)
    after = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.relative_to(home / "models").parts[0] for path in after.keys() - before.keys()} == {
        "personal"
    }


def test_what_is_missing_or_of_another_base_is_named(
    home: Path, pico_domain: Any, make_pico: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no personal model"):
        personal_model(home)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        interpolate(home, pico_domain, shares=[1.5])
    with pytest.raises(ModelError, match="no universal model"):
        interpolate(tmp_path / "empty", pico_domain)
    set_own_model(home, make_pico(tmp_path / "wider", hidden_size=64))
    with pytest.raises(BaseMismatchError, match="different tensors"):
        interpolate(home, pico_domain)


def test_recommendations_read_items_as_their_model_was_trained_to(home: Path, pico_domain: Any) -> None:
    folder = current_or_fail(home)
    found = recommend(folder, pico_domain, ["i003", "i010"])
    assert found == recommend(folder, pico_domain, ["i003", "i010"], text=CONFIG.text)
    assert found != recommend(folder, pico_domain, ["i003", "i010"], text=RunConfig().text)
    (folder / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        recommend(folder, pico_domain, ["i003"])


def test_status_says_where_the_universal_model_is_worse(home: Path) -> None:
    address = ServerAddress(name="s", fleet="", exchange="", enrol="", public_key="", log_key="")
    ClientHome.write_config(home, ClientConfig(domain="tea", pseudonym="p", server=address, data=""))
    write_policy(home)
    own = {"recall@10": 0.2, "ndcg@10": 0.1}
    for ndcg, worse in ((0.09, True), (0.1, False), (0.11, False)):
        record = {"universal": {"recall@10": 0.3, "ndcg@10": ndcg}, "own": own}
        (current_or_fail(home) / "comparison.json").write_text(json.dumps(record))
        said = CliRunner().invoke(app, ["status", "--home", str(home)]).output
        assert f"ndcg@10 {ndcg:.4f}, own model 0.1000" in said
        assert ("ranks worse than your own" in said) == worse
