"""A whole run of two owners whose vectors are adapters of a tiny language model: sent, merged, installed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from localgrid import LocalFederation
from safetensors.torch import load_file

from clients.explain import explanation, in_words
from clients.serving import current, own_model, recommend
from common.config import RunConfig
from common.errors import ConfigError, ModelError
from common.language.adapters import adapter_digest, adapter_tensors, load_adapter
from common.language.model import load_causal
from common.parcels import Kind
from server import rounds
from server.cli import create_run
from server.federation import Control
from server.rounds import execute
from server.runs import Run
from tests.unit.language.conftest import build_causal

ACTIONS = ("contribute", "evaluate", "install")


def language_run(base: Path, **lora: Any) -> RunConfig:
    """Two steps on four candidates; three rules of merging."""
    return RunConfig.model_validate(
        {
            "run": {"name": "adapters"},
            "base": {"model": str(base)},
            "training": {
                "batch_size": 4, "max_steps": 2, "warmup_steps": 1, "learning_rate": 1e-2,
                "precision": "fp32", "eval_every_steps": 2, "checkpoint_every_steps": 2,
                "validation_users": 4,
            },
            "lora": {"rank": 2, "alpha": 4.0, "modules": ["q_proj", "down_proj"], **lora},
            "instruction": {"candidates": 4},
            "merge": [
                {"method": "factors"}, {"method": "product"},
                {"method": "knots", "options": {"method": "task-arithmetic"}},
            ],
            "publish": "product",
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, make_domain: Callable[..., Any]
) -> Iterator[LocalFederation]:
    """Two domains with a tiny Qwen2."""
    folder = tmp_path_factory.mktemp("language")
    base = build_causal(folder / "base", "qwen2")
    with LocalFederation(folder / "federation", base, make_domain) as federation:
        yield federation


@pytest.fixture(scope="module")
def done(federation: LocalFederation) -> Run:
    """A run to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "Control", partial(Control, sleep_s=0.0))
        run = create_run(federation.server(), language_run(federation.base, publish_merged=True))
        grid = federation.grid()
        execute(grid, federation.server(), run)
    assert Counter(grid.asked) == {(domain, action): 1 for domain in federation.domains for action in ACTIONS}
    return run


def test_adapters_cross_and_nothing_else(federation: LocalFederation, done: Run) -> None:
    assert done.state["state"] == "done"
    table = adapter_tensors(federation.base, done.spec.config.lora)  # type: ignore[arg-type]
    assert {name: tuple(shape) for name, shape in done.spec.tensors.items()} == table
    store = federation.server().store
    vectors = [store.get(found.digest) for found in store.find(run=done.spec.run_id, kind=Kind.TASK_VECTOR)]
    assert len(vectors) == 2
    for parcel in vectors:
        assert parcel is not None
        sent = load_file(parcel.payload)
        assert {name: tuple(tensor.shape) for name, tensor in sent.items()} == table
        assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16}
    kinds = Counter(kind for _, _, kind in federation.delivered(done))
    assert kinds == {"domain-card": 2, "catalog": 2, "task-vector": 2, "metrics": 6}


def test_the_table_of_results_has_the_metrics_of_ranking(federation: LocalFederation, done: Run) -> None:
    summary = json.loads((done.folder / "summary.json").read_text())
    assert list(summary["results"]) == ["zero-shot", "fine-tuned", "factors", "product", "knots", "universal"]
    for row in summary["results"].values():
        assert set(row) == set(federation.domains)
        assert all(set(metrics) == {"ndcg@1", "ndcg@3", "recall@3", "recall@10"} for metrics in row.values())
    assert summary["results"]["universal"] == summary["results"]["product"]
    assert "largest_cut_to_rank" in summary["merges"]["product"]["facts"]
    assert "factors" in (done.folder / "report.html").read_text()


def test_published_and_installed_are_one_adapter_that_peft_loads(
    federation: LocalFederation, done: Run
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    published = done.folder / "model"
    assert {path.name for path in published.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "merge.json",
    }  # fmt: skip
    digest = adapter_digest(published)
    for domain in federation.domains:
        installed = current(federation.path(domain))
        assert installed is not None and installed.name == adapter_digest(installed) == digest
    everything = "".join(path.read_text() for path in published.iterdir() if path.suffix in (".md", ".json"))
    assert str(federation.base) not in everything
    assert not any(domain in everything for domain in federation.domains)

    base = AutoModelForCausalLM.from_pretrained(federation.base)
    with_adapter = PeftModel.from_pretrained(base, published).eval()
    merged = AutoModelForCausalLM.from_pretrained(done.folder / "merged").eval()
    ids = torch.tensor([load_causal(federation.base, precision="fp32").encode("green tea\n- red cup")])
    with torch.no_grad():
        expected = with_adapter(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
        with with_adapter.disable_adapter():
            assert not torch.allclose(with_adapter(ids).logits, expected, atol=1e-4)


def test_the_published_adapter_is_the_exact_mean_of_the_updates_cut_to_the_rank(
    federation: LocalFederation, done: Run
) -> None:
    _, published = load_adapter(done.folder / "model")
    own = [load_adapter(own_model(federation.path(domain)))[1] for domain in federation.domains]
    for name in published:
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        mean = sum(adapter[other] @ adapter[name] for adapter in own) / 2
        U, S, V = torch.linalg.svd(torch.as_tensor(mean))
        best = U[:, :2] * S[:2] @ V[:2]
        error = (published[other] @ published[name] - best).norm() / best.norm()
        assert error < 0.02, name  # bf16 on the wire


def test_an_owner_recommends_with_the_installed_adapter(federation: LocalFederation, done: Run) -> None:
    from clients.data.domain import Domain

    home = federation.path("toys")
    folder = current(home)
    assert folder is not None
    domain = Domain.load(federation.folder / "data" / "toys")
    found = recommend(folder, domain, domain.item_ids[:2], 2)
    assert len(found) == 2 and len({item for item, _, _ in found}) == 2
    with pytest.raises(ConfigError, match="at most 2"):
        recommend(folder, domain, domain.item_ids[:2], 3)
    assert [score for _, _, score in found] == sorted((score for _, _, score in found), reverse=True)
    assert not {item for item, _, _ in found} & set(domain.item_ids[:2])
    given = recommend(folder, domain, domain.item_ids[:2], 9, candidates=domain.item_ids[3:7])
    assert {item for item, _, _ in given} == set(domain.item_ids[3:7])
    assert all(title == domain.attributes["title"][domain.item_ids.index(item)] for item, title, _ in given)


def test_an_owner_sees_what_an_adapter_of_its_base_would_be(federation: LocalFederation) -> None:
    home = federation.owner("toys")
    vector = explanation(home)["vector"]
    assert vector["adapter"] and vector["tensors"] == 2 * 2 * 7  # A and B of seven modules in two layers
    said = "\n".join(in_words(explanation(home), home.path / "policy.toml"))
    assert "28 tensors of an adapter of this base, with the default [lora], in bf16" in said


def test_what_cannot_be_is_refused_before_anybody_trains(federation: LocalFederation) -> None:
    server = federation.server()
    config = language_run(federation.base)
    with pytest.raises(ModelError, match="no linear layer is called 'qproj'"):
        create_run(server, language_run(federation.base, modules=["qproj"]))
    with pytest.raises(ModelError, match="a row for each word"):
        create_run(server, language_run(federation.base, modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="unknown merge method of adapters"):
        wrong = config.model_copy(update={"merge": (config.merge[0].model_copy(update={"method": "ties"}),)})
        create_run(server, wrong)
    with pytest.raises(ConfigError, match="rank by instructions"):
        create_run(server, RunConfig.model_validate({"base": {"model": str(federation.base)}}))


def test_encoders_ship_adapters_too(
    tmp_path: Path, pico_model: Path, make_domain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    from clients.data.domain import Domain
    from clients.training.adapters import load_adapted

    monkeypatch.setattr(rounds, "Control", partial(Control, sleep_s=0.0))
    record = language_run(pico_model).model_dump(mode="json", exclude={"instruction", "evaluation"})
    lora = {"rank": 2, "alpha": 4.0, "modules": ["query", "value"], "publish_merged": True}
    config = RunConfig.model_validate({**record, "lora": lora, "text": {"max_seq_len": 32}})
    with LocalFederation(tmp_path, pico_model, make_domain) as federation:
        run = create_run(federation.server(), config)
        execute(federation.grid(), federation.server(), run)
        installed = current(federation.path("toys"))
    assert installed is not None and installed.name == adapter_digest(run.folder / "model")
    summary = json.loads((run.folder / "summary.json").read_text())
    assert all(set(found) == {"recall@10", "ndcg@10"} for found in summary["results"]["universal"].values())
    text = "title: red cup"
    encoder = load_adapted(installed)
    z_E = encoder.encode([encoder.tokenizer(text)["input_ids"]])[0]
    merged = torch.as_tensor(SentenceTransformer(str(run.folder / "merged"), device="cpu").encode(text))
    assert torch.allclose(z_E, merged, atol=1e-5)
    domain = Domain.load(federation.folder / "data" / "toys")
    assert len(recommend(installed, domain, domain.item_ids[:2], 3)) == 3
    only = recommend(installed, domain, domain.item_ids[:2], 9, candidates=domain.item_ids[3:6])
    assert {item for item, _, _ in only} == set(domain.item_ids[3:6])
