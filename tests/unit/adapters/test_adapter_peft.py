"""Against PEFT itself: what it computes where it has the rule, and that it loads what is written here.

PEFT and torch are development dependencies; nothing in `server.adapters` imports them.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.language.peft_folder import read_adapter
from common.low_rank import LowRank
from server.adapters import merge_adapters

peft = pytest.importorskip("peft", reason="peft is a development dependency")

# peft asks transformers by a name that the latter deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WEIGHTS = [0.6, -0.3, 0.5]
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj"],
    "bert": ["query", "value", "output.dense"],
}


def build_base(kind: str) -> Any:
    """A tiny model with random weights."""
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(0)
    if kind == "bert":
        return BertModel(BertConfig(vocab_size=32, max_position_embeddings=32, **SIZES)).eval()
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    return model(config(vocab_size=32, num_key_value_heads=1, tie_word_embeddings=False, **SIZES)).eval()


def build_adapter(base: Any, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter with random A and B, written by PEFT."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(lora_dropout=0.1, **settings))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module", params=sorted(TARGETS))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, Path]]:
    """A base model, and three adapters over it whose ranks and scalings differ."""
    root, base = tmp_path_factory.mktemp(request.param), build_base(request.param)
    targets = TARGETS[request.param]
    patterns = {"rank_pattern": {targets[0]: 4}, "alpha_pattern": {targets[1]: 3}}
    folders = {
        "a": build_adapter(base, root / "a", 1, r=2, lora_alpha=4, target_modules=targets),
        "b": build_adapter(base, root / "b", 2, r=3, lora_alpha=3, use_rslora=True, target_modules=targets),
        "c": build_adapter(base, root / "c", 3, r=2, lora_alpha=8, target_modules=targets, **patterns),
    }
    base.save_pretrained(root / "base")
    return base, folders | {"base": root / "base"}


@pytest.fixture(scope="module")
def equal_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    """Three adapters of one rank and one scaling over the tiny Llama."""
    root, base = tmp_path_factory.mktemp("equal"), build_base("llama")
    return base, {
        name: build_adapter(base, root / name, seed, r=4, lora_alpha=8, target_modules=TARGETS["llama"])
        for seed, name in enumerate("abc")
    }


def load(base: Any, folders: dict[str, Path]) -> Any:
    """A PeftModel with every adapter loaded."""
    (first, folder), *rest = folders.items()
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=first)
    for name, other in rest:
        model.load_adapter(other, adapter_name=name)
    return model.eval()


def deltas(model: Any, name: str) -> dict[str, np.ndarray]:
    """PEFT's own dense update of every adapted layer."""
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight(name).detach().double().numpy()
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and name in module.lora_A
    }


def combined(base: Any, folders: dict[str, Path], kind: str, **settings: Any) -> dict[str, np.ndarray]:
    """The update of PEFT's `add_weighted_adapter`."""
    model = load(base, folders)
    model.add_weighted_adapter(list(folders), WEIGHTS, "merged", combination_type=kind, **settings)
    return deltas(model, "merged")


def dense(folder: Path) -> dict[str, np.ndarray]:
    adapter = read_adapter("x", folder)
    return {
        path: module.scaling * LowRank.of(*adapter.factors(path)).dense()
        for path, module in adapter.modules.items()
    }


def product(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {path: sum(w * part[path] for w, part in zip(WEIGHTS, parts, strict=True)) for path in parts[0]}


def assert_close(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 2e-6
) -> None:
    assert got.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_allclose(got[path], values, rtol=0, atol=tolerance * np.abs(values).max())


def off(got: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """Relative distance over all layers, in Frobenius norm."""
    wrong = sum(float(np.sum((got[path] - exact[path]) ** 2)) for path in exact)
    return math.sqrt(wrong / sum(float(np.sum(values**2)) for values in exact.values()))


def adapters_of(folders: dict[str, Path]) -> dict[str, Path]:
    return {name: folders[name] for name in "abc"}


def test_scalings_and_updates_are_read_as_peft_reads_them(family: Any) -> None:
    base, folders = family
    model = load(base, adapters_of(folders))
    for name, folder in adapters_of(folders).items():
        assert_close(dense(folder), deltas(model, name))


def test_product_is_pefts_cat_and_the_sum_of_its_deltas(family: Any, tmp_path: Path) -> None:
    base, folders = family
    adapters = adapters_of(folders)
    merge_adapters(adapters, method="product", weights=WEIGHTS, out=tmp_path / "out", base=folders["base"])
    model = load(base, adapters)
    assert_close(dense(tmp_path / "out"), product([deltas(model, name) for name in adapters]))
    assert_close(dense(tmp_path / "out"), combined(base, adapters, "cat"))
    assert_close(deltas(load(base, {"m": tmp_path / "out"}), "m"), dense(tmp_path / "out"))


@pytest.mark.parametrize("rank", [1, 3])
def test_truncated_product_is_pefts_svd(family: Any, tmp_path: Path, rank: int) -> None:
    base, folders = family
    adapters = adapters_of(folders)
    merge_adapters(adapters, method="product", options={"rank": rank}, weights=WEIGHTS, out=tmp_path / "out")
    theirs = combined(base, adapters, "svd", svd_rank=rank)
    assert_close(dense(tmp_path / "out"), theirs, tolerance=2e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("product", {}),
        ("product", {"rank": 9}),  # above what some layers can have: ranks differ, by patterns
        ("knots", {"method": "ties", "density": 0.5}),
    ],
)
def test_what_is_written_loads_and_gives_the_logits_of_the_dense_update(
    family: Any, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    base, folders = family
    out = tmp_path / "out"
    merge_adapters(adapters_of(folders), method=method, options=options, weights=WEIGHTS, out=out)
    changed = copy.deepcopy(base)
    for path, update in dense(out).items():
        changed.get_submodule(path).weight.data += torch.from_numpy(update).float()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        theirs, ours = load(base, {"m": out})(input_ids=tokens)[0], changed(input_ids=tokens)[0]
        before = base(input_ids=tokens)[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().max() > 1e-2


def test_factors_with_roots_of_the_weights_is_pefts_linear(equal_ranks: Any, tmp_path: Path) -> None:
    """Also for a negative weight, whose sign PEFT puts on A."""
    base, folders = equal_ranks
    merge_adapters(
        folders, method="factors", options={"weighting": "sqrt"}, weights=WEIGHTS, out=tmp_path / "out"
    )
    assert_close(dense(tmp_path / "out"), combined(base, folders, "linear"))


def test_untrimmed_ties_on_the_factors_is_pefts_ties(equal_ranks: Any, tmp_path: Path) -> None:
    """At density 1 and equal weights: below, PEFT trims within each tensor and TIES over the whole vector;
    PEFT weighs after the election of signs, here vectors are weighed before."""
    base, folders = equal_ranks
    options = {"method": "ties", "density": 1.0, "weighting": "sqrt"}
    merge_adapters(folders, method="elementwise", options=options, weights=[0.5] * 3, out=tmp_path / "out")
    model = load(base, folders)
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        model.add_weighted_adapter(list(folders), [0.5] * 3, "m", combination_type="ties", density=1.0)
    assert_close(dense(tmp_path / "out"), deltas(model, "m"))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", {}),
        ("ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5}),
        ("magnitude_prune", {"density": 0.5}),
    ],
)
def test_mixing_a_and_b_separately_is_far_from_the_product(
    equal_ranks: Any, kind: str, settings: dict[str, Any]
) -> None:
    """Here 142%, 109%, 322% and 137% off; PEFT's own `cat` is not."""
    base, folders = equal_ranks
    exact = product([dense(folder) for folder in folders.values()])
    torch.manual_seed(0)
    distance = off(combined(base, folders, kind, **settings), exact)
    print(f"{kind}: {100 * distance:.0f}% off")
    assert distance > 0.5
    assert off(combined(base, folders, "cat"), exact) < 1e-6


def test_adapters_that_name_their_layers_differently(tmp_path: Path) -> None:
    """A list and a regular expression for the same layers: the result names each layer, and PEFT loads it."""
    base = build_base("llama")
    folders = {
        "list": build_adapter(base, tmp_path / "list", 1, r=2, target_modules=["q_proj", "v_proj"]),
        "text": build_adapter(base, tmp_path / "text", 2, r=3, target_modules=r".*\.[qv]_proj"),
    }
    merge_adapters(folders, method="product", out=tmp_path / "out")
    targets = read_adapter("out", tmp_path / "out").config["target_modules"]
    assert targets == [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"]
    assert_close(deltas(load(base, {"m": tmp_path / "out"}), "m"), dense(tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
        ({"init_lora_weights": "olora"}, "changes the base's own weights"),
    ],
)
def test_what_peft_can_write_and_is_not_supported_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    from common.errors import ModelError

    folder = build_adapter(
        build_base("llama"), tmp_path / "bad", 1, r=2, target_modules=["q_proj"], **settings
    )
    with pytest.raises(ModelError, match=message):
        read_adapter("bad", folder)


def test_another_peft_type_is_refused(tmp_path: Path) -> None:
    from common.errors import ModelError

    model = peft.get_peft_model(build_base("llama"), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "loha")
    with pytest.raises(ModelError, match="peft_type = 'LOHA' is not supported"):
        read_adapter("loha", tmp_path / "loha")


def test_a_pattern_and_its_reading(tmp_path: Path) -> None:
    """Ranks and alphas by regular expression, the first match counting, as PEFT resolves them."""
    base = build_base("llama")
    folder = build_adapter(
        base, tmp_path / "a", 1, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3, "q_proj": 5},
        alpha_pattern={r"model\.layers\.0\..*": 7, "v_proj": 6},
    )  # fmt: skip
    assert_close(dense(folder), deltas(load(base, {"a": folder}), "a"))
