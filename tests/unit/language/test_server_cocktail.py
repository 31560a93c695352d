"""Cocktails at the server: base spirits, and merge methods that learn from pseudo-users' prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.catalog import Catalog
from common.config import InstructionSection, LoraSection, RunConfig
from common.errors import ConfigError, DataError, VectorError
from common.language.adapters import Adapter, adapter_tensors, check_adapter, save_adapter
from common.language.mixing import mix, section_of_rank
from common.learning_state import read_trajectory
from common.progress import NO_REPORT
from server.language.cocktail import PseudoOptions, cocktail_for
from server.language.registry import METHODS, AdapterInputs
from server.language.spirit import public_adapter, spirit
from tests.conftest import WORDS

pytestmark = pytest.mark.parametrize("tiny_causal", ["llama"], indirect=True)
LORA = LoraSection(rank=2, alpha=4.0, modules=("q_proj", "down_proj"))
QUICK = {"steps": 2, "batch_size": 3, "prompts": 6, "evaluate_every_steps": 1, "learning_rate": 0.2}
DOMAINS = ("garden", "tea", "toys")


def catalog(domain: str, items: int = 20, **columns: list[str]) -> Catalog:
    start = 7 * len(domain)
    titles = [f"{WORDS[(start + n) % len(WORDS)]} {n}" for n in range(items)]
    return Catalog(domain, [f"{domain}-{n}" for n in range(items)], columns or {"title": titles})


def adapter_of(base: Path, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=generator)
        for name, shape in adapter_tensors(base, LORA).items()
    }


@pytest.fixture
def inputs(tiny_causal: Path, tmp_path: Path) -> AdapterInputs:
    work = tmp_path / "work"
    work.mkdir()
    return AdapterInputs(
        base=tiny_causal,
        lora=LORA,
        adapters={name: adapter_of(tiny_causal, n) for n, name in enumerate(DOMAINS)},
        catalogs={name: catalog(name) for name in DOMAINS},
        config=RunConfig(lora=LORA, instruction=InstructionSection(candidates=5)),
        work=work,
        report=NO_REPORT,
    )


def run(name: str, inputs: AdapterInputs, **options: Any) -> Any:
    return METHODS[name](inputs, METHODS[name].check({**QUICK, **options}))


def test_cocktail_of_all_domains(inputs: AdapterInputs) -> None:
    made = run("cocktail", inputs)
    check_adapter(made.adapter, adapter_tensors(inputs.base, LORA))
    weights = made.coefficients["all"]
    assert list(weights) == list(DOMAINS) and sum(weights.values()) == pytest.approx(1)
    for name, tensor in mix(dict(inputs.adapters), list(weights.values())).items():
        torch.testing.assert_close(made.adapter[name], tensor)
    assert made.facts["prompts"] == {"learned_from": 5, "held_back": 1}
    lines = read_trajectory(inputs.work / "trajectory.jsonl")
    assert lines[0]["coefficients"]["all"] == pytest.approx(dict.fromkeys(DOMAINS, 1 / 3))
    again = run("cocktail", inputs)
    assert again.coefficients == made.coefficients


def test_cocktail_of_spirit_and_ingredient(inputs: AdapterInputs, tmp_path: Path) -> None:
    options = PseudoOptions(**QUICK, histories="rolled-out", rule="product")
    made = cocktail_for(inputs, "tea", options, spirit_by="factors")
    check_adapter(made.adapter, adapter_tensors(inputs.base, LORA))
    assert list(made.coefficients["all"]) == ["base spirit", "ingredient"]
    assert made.facts["spirit"]["domains"] == ["garden", "toys"] and made.facts["largest_residual"] > 0
    save_adapter(inputs.base, LORA, inputs.adapters["toys"], tmp_path / "public", "")
    public = cocktail_for(inputs, "tea", PseudoOptions(**QUICK), spirit_by=str(tmp_path / "public"))
    assert public.facts["spirit"] == {"spirit": "public adapter"}
    with pytest.raises(ConfigError, match="no adapter of domain 'coffee'"):
        cocktail_for(inputs, "coffee")
    together = run("cocktail", inputs, spirit="knots")
    assert list(together.coefficients["all"]) == ["base spirit", *DOMAINS]
    with pytest.raises(ConfigError, match="no base spirit by 'knot'; did you mean 'knots'"):
        METHODS["cocktail"].check({"spirit": "knot"})


@pytest.mark.parametrize("method", ["product", "factors", "knots", "elementwise", "adamerging", "cocktail"])
def test_a_spirit_knows_nothing_of_its_domain(inputs: AdapterInputs, method: str) -> None:
    """Another adapter and catalog of the domain left out give the same spirit."""
    options = QUICK if method in ("adamerging", "cocktail") else {}
    made = spirit(inputs, method, without="tea", options=options)
    inputs.adapters["tea"].update(adapter_of(inputs.base, 99))  # type: ignore[attr-defined]
    inputs.catalogs["tea"] = catalog("coffee")  # type: ignore[index]
    again = spirit(inputs, method, without="tea", options=options)
    assert made.adapter.keys() == again.adapter.keys()
    assert all(torch.equal(made.adapter[name], again.adapter[name]) for name in made.adapter)
    assert made.facts["domains"] == ["garden", "toys"]


def test_spirits_that_cannot_be(inputs: AdapterInputs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'product'"):
        spirit(inputs, "prodct", without="tea")
    alone = AdapterInputs(**{**vars(inputs), "adapters": {"tea": inputs.adapters["tea"]}})
    with pytest.raises(ConfigError, match="no domain beside 'tea'"):
        spirit(alone, "product", without="tea")
    other = LORA.model_copy(update={"modules": ("q_proj",)})
    less = {name: tensor for name, tensor in inputs.adapters["tea"].items() if "q_proj" in name}
    save_adapter(inputs.base, other, less, tmp_path / "other", "")
    with pytest.raises(VectorError, match=r"down_proj.*is missing"):
        public_adapter(tmp_path / "other", inputs.base, LORA)


def test_a_public_adapter_of_another_rank_and_scaling_fits(tiny_causal: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tiny_causal, 1)
    small = LORA.model_copy(update={"rank": 1, "alpha": 5.0})
    first = {name: tensor[:1] if ".lora_A." in name else tensor[:, :1] for name, tensor in adapter.items()}
    save_adapter(tiny_causal, small, first, tmp_path / "small", "")
    fitted = public_adapter(tmp_path / "small", tiny_causal, LORA)
    for name in first:
        if ".lora_B." in name:
            a = name.replace("lora_B", "lora_A")
            torch.testing.assert_close(2.0 * fitted[name] @ fitted[a], 5.0 * first[name] @ first[a])
    assert section_of_rank(small, 2).scaling == 5.0


@pytest.mark.parametrize("method", ["adamerging", "mergerec", "ranking-distillation"])
def test_learned_coefficients_of_adapters(inputs: AdapterInputs, method: str) -> None:
    made = run(method, inputs, granularity="layer")
    check_adapter(made.adapter, adapter_tensors(inputs.base, LORA))
    assert list(made.coefficients) == ["layer-0", "layer-1"]
    assert made.facts["steps"] >= 1 and set(made.facts["held_back_loss"]["alone"]) == set(DOMAINS)


def test_a_domain_without_catalog_is_named(inputs: AdapterInputs) -> None:
    del inputs.catalogs["toys"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="'toys' has a task vector but no catalog"):
        run("cocktail", inputs)
    made = cocktail_for(inputs, "tea", PseudoOptions(**QUICK))
    assert made.coefficients["all"].keys() == {"base spirit", "ingredient"}
