"""Merge methods of a run with [lora]: they keep the run's rank and scaling, and say what they cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import LoraSection, MergeMethod, RunConfig
from common.errors import ConfigError, VectorError
from common.language.adapters import Adapter, adapter_tensors, check_adapter
from common.progress import NO_REPORT
from server.language.registry import METHODS, AdapterInputs
from server.merge import check_method, run_merge
from tests.unit.language.conftest import build_causal

LORA = LoraSection(rank=2, alpha=6.0, modules=("q_proj", "down_proj"))
RULES = ("elementwise", "factors", "knots", "product")
A = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_causal(tmp_path_factory.mktemp("causal") / "qwen2")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(0)
    table = adapter_tensors(base, LORA)
    return {
        domain: {name: torch.randn(shape, generator=generator) for name, shape in table.items()}
        for domain in ("books", "garden", "toys")
    }


def config_of(base: Path, *methods: MergeMethod) -> RunConfig:
    given = {"base": {"model": str(base)}, "instruction": {}, "lora": LORA.model_dump()}
    return RunConfig.model_validate({**given, "merge": [method.model_dump() for method in methods]})


def inputs_of(base: Path, adapters: dict[str, Adapter], work: Path) -> AdapterInputs:
    config = config_of(base, MergeMethod(method="product"))
    return AdapterInputs(base, LORA, adapters, {}, config, work, NO_REPORT)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_the_runs_table(
    name: str, base: Path, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    found = METHODS[name](inputs_of(base, adapters, tmp_path), METHODS[name].check({}))
    check_adapter(found.adapter, adapter_tensors(base, LORA))
    assert all(value >= 0 for value in found.facts.values())


def test_factors_are_the_means_of_the_factors(
    base: Path, adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    found = METHODS["factors"](inputs_of(base, adapters, tmp_path), METHODS["factors"].check({}))
    for name, tensor in found.adapter.items():
        assert torch.allclose(tensor, sum(own[name] for own in adapters.values()) / 3, atol=1e-6)
    assert found.facts["largest_cut_to_rank"] == 0.0


def test_product_is_the_best_of_its_rank(base: Path, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    found = METHODS["product"](inputs_of(base, adapters, tmp_path), METHODS["product"].check({}))
    mean = torch.stack([own[B] @ own[A] for own in adapters.values()]).mean(dim=0)
    U, S, V = torch.linalg.svd(mean, full_matrices=False)
    best = U[:, :2] * S[:2] @ V[:2]
    assert torch.allclose(found.adapter[B] @ found.adapter[A], best, atol=1e-4)
    assert found.facts["largest_cut_to_rank"] >= float((mean - best).norm() / mean.norm()) - 1e-6


def test_one_owner_alone_gets_its_own_back(base: Path, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    alone = {"toys": adapters["toys"]}
    for name in ("factors", "product"):
        found = METHODS[name](inputs_of(base, alone, tmp_path), METHODS[name].check({}))
        assert torch.allclose(
            found.adapter[B] @ found.adapter[A], adapters["toys"][B] @ adapters["toys"][A], atol=1e-4
        )


def test_a_merge_is_journaled_and_done_once(base: Path, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    method = MergeMethod(method="knots", options={"method": "ties", "density": 0.5})
    config = config_of(base, method)
    first = run_merge(method, base, adapters, {}, config, tmp_path)
    again = run_merge(method, base, adapters, {}, config, tmp_path)
    assert (first.resumed, again.resumed) == (False, True)
    assert first.options["density"] == 0.5
    assert all(torch.equal(first.vector[name], again.vector[name]) for name in first.vector)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})})
    assert not run_merge(method, base, adapters, {}, other, tmp_path).resumed


def test_named_refusals(base: Path, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    config = config_of(base, MergeMethod(method="product"))
    with pytest.raises(ConfigError, match="unknown merge method of adapters 'factor'"):
        check_method(MergeMethod(method="factor"), config)
    with pytest.raises(ConfigError, match="rnak"):
        check_method(MergeMethod(method="product", options={"rnak": 2}), config)
    with pytest.raises(ConfigError, match="unknown merge method 'product'"):
        check_method(MergeMethod(method="product"))
    wrong = {**adapters, "toys": {**adapters["toys"], A: torch.full_like(adapters["toys"][A], torch.nan)}}
    with pytest.raises(VectorError, match=r"NaN|finite"):
        run_merge(config.merge[0], base, wrong, {}, config, tmp_path)
