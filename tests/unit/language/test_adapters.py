"""Adapters as vectors: their table, their first values, their folder, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import LoraSection, RunConfig, validate
from common.errors import BaseMismatchError, ConfigError, ModelError, VectorError
from common.language.adapters import (
    Adapter,
    adapter_digest,
    adapter_tensors,
    base_of,
    check_adapter,
    folder_digest,
    initial_adapter,
    load_adapter,
    save_adapter,
)
from common.language.merged import merge_into_base
from common.language.model import load_causal
from common.language.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from common.models.base import model_digest, trainable_norm, weight_files

LORA = LoraSection(rank=3, alpha=6.0, modules=("q_proj", "down_proj"))
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def drawn(base: Path, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) for n, shape in adapter_tensors(base, LORA).items()}


def test_the_table_is_that_of_peft(tiny_causal: Path) -> None:
    lm = load_causal(tiny_causal, precision="fp32")
    lm.attach(LORA)
    loaded = {name: tuple(parameter.shape) for name, parameter in lm.lora_parameters().items()}
    assert adapter_tensors(tiny_causal, LORA) == loaded
    assert len(loaded) == 2 * 2 * 2  # A and B of two modules in two layers
    assert loaded[NAME.format("A")] == (3, 32) and loaded[NAME.format("B")] == (32, 3)


def test_a_folder_reads_back_bit_for_bit(tiny_causal: Path, tmp_path: Path) -> None:
    adapter = drawn(tiny_causal)
    save_adapter(tiny_causal, LORA, adapter, tmp_path / "a", "# An adapter\n", base_name=str(tiny_causal))
    lora, read = load_adapter(tmp_path / "a")
    assert lora == LORA
    assert read.keys() == adapter.keys() and all(torch.equal(read[name], adapter[name]) for name in read)
    assert base_of(tmp_path / "a") == tiny_causal
    save_adapter(tiny_causal, LORA, adapter, tmp_path / "b", "# Elsewhere\n")
    assert base_of(tmp_path / "b") is None
    assert adapter_digest(tmp_path / "a") == adapter_digest(tmp_path / "b") == folder_digest(tmp_path / "b")
    save_adapter(tiny_causal, LORA, drawn(tiny_causal, 1), tmp_path / "b", "# Another\n")
    assert adapter_digest(tmp_path / "a") != adapter_digest(tmp_path / "b")
    assert folder_digest(tiny_causal) == model_digest(tiny_causal)


def test_a_new_adapter_is_the_base(tiny_causal: Path) -> None:
    lm = load_causal(tiny_causal, precision="fp32")
    ids = torch.tensor([lm.encode("red cup")])
    with torch.no_grad():
        plain = lm.model(ids).logits
        lm.attach(LORA, initial_adapter(adapter_tensors(tiny_causal, LORA), seed=3))
        assert torch.equal(lm.model(ids).logits, plain)
    A = lm.adapter()[NAME.format("A")]
    assert 0.9 < float(A.abs().max()) * 32**0.5 <= 1.0  # uniform within 1 / sqrt(inputs)


def test_merged_into_the_base_it_says_the_same(tiny_causal: Path, tmp_path: Path) -> None:
    adapter = {name: 0.1 * tensor for name, tensor in drawn(tiny_causal).items()}
    merge_into_base(tiny_causal, LORA, adapter, tmp_path / "merged", "# Merged\n")
    lm, merged = (load_causal(folder, precision="fp32") for folder in (tiny_causal, tmp_path / "merged"))
    ids = torch.tensor([lm.encode("red cup and green tea")])
    lm.attach(LORA, adapter)
    with torch.no_grad():
        assert torch.allclose(merged.model(ids).logits, lm.model(ids).logits, atol=1e-4)
    assert merged.encode("red cup") == lm.encode("red cup")


def test_a_base_in_shards_is_the_same_base(tiny_causal: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded, adapter = tmp_path / "sharded", drawn(tiny_causal)
    shutil.copytree(tiny_causal, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_causal).save_pretrained(sharded, max_shard_size="40KB")
    assert len(weight_files(sharded)) > 1
    assert model_digest(sharded) == model_digest(tiny_causal)
    assert trainable_norm(sharded) == pytest.approx(trainable_norm(tiny_causal))
    assert adapter_tensors(sharded, LORA) == adapter_tensors(tiny_causal, LORA)
    merge_into_base(sharded, LORA, adapter, tmp_path / "merged", "")
    merge_into_base(tiny_causal, LORA, adapter, tmp_path / "whole", "")
    assert model_digest(tmp_path / "merged") == model_digest(tmp_path / "whole")
    weight_files(sharded)[0].unlink()
    with pytest.raises(ModelError, match="no model-00001"):
        model_digest(sharded)


def without(adapter: Adapter, name: str) -> Adapter:
    return {key: tensor for key, tensor in adapter.items() if key != name}


def test_what_is_not_the_runs_adapter_is_refused_by_name(tiny_causal: Path) -> None:
    table, adapter = adapter_tensors(tiny_causal, LORA), drawn(tiny_causal)
    A, B, other = NAME.format("A"), NAME.format("B"), NAME.format("A").replace("q_proj", "v_proj")
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    cases: dict[str, Adapter] = {
        "rank 5, expected 3": {**adapter, A: torch.zeros(5, 32)},
        r"lora_B.* has rank 2, expected 3": {**adapter, B: torch.zeros(32, 2)},
        r"shape \[3, 31\], expected \[3, 32\]": {**adapter, A: torch.zeros(3, 31)},
        r"extra tensor '.*v_proj": {**adapter, other: torch.zeros(3, 32)},
        r"extra tensor '.*embed_tokens": {**adapter, embedding: torch.zeros(3, 400)},
        r"q_proj.lora_B.weight' is missing": without(adapter, B),
        "NaN": {**adapter, A: torch.full((3, 32), torch.nan)},
        "infinite": {**adapter, A: torch.full((3, 32), torch.inf)},
    }
    check_adapter(adapter, table)
    for said, wrong in cases.items():
        with pytest.raises(VectorError, match=said):
            check_adapter(wrong, table)


def test_another_base_is_refused_by_name(
    tiny_causal: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.unit.language.conftest import build_causal

    wider = build_causal(tmp_path_factory.mktemp("wider") / "qwen2", hidden_size=48)
    with pytest.raises(VectorError, match=r"q_proj|down_proj"):
        save_adapter(wider, LORA, drawn(tiny_causal), tmp_path / "out", "")
    assert not (tmp_path / "out").exists()
    save_adapter(tiny_causal, LORA, drawn(tiny_causal), tmp_path / "unnamed", "")
    with pytest.raises(VectorError, match=r"q_proj|down_proj"):
        load_adapter(tmp_path / "unnamed", wider)


def test_another_base_of_the_same_shapes_is_refused_where_it_is_known(
    tiny_causal: Path, tmp_path: Path
) -> None:
    """`tiny` copied is the same base; with other weights it is not."""
    save_adapter(tiny_causal, LORA, drawn(tiny_causal), tmp_path / "a", "", base_name=str(tiny_causal))
    other = tmp_path / "other"
    shutil.copytree(tiny_causal, other)
    assert load_adapter(tmp_path / "a", other)[0] == LORA
    tensors = load_file(other / "model.safetensors")
    first = min(tensors)
    save_file({**tensors, first: tensors[first] + 1}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError, match="another model than"):
        load_adapter(tmp_path / "a", other)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (("qproj",), "did you mean 'q_proj'"),
        (("embed_tokens",), "a row for each word"),
        (("norm",), "no linear layer is called 'norm'"),
    ],
)
def test_modules_that_cannot_be(tiny_causal: Path, modules: tuple[str, ...], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        adapter_tensors(tiny_causal, LORA.model_copy(update={"modules": modules}))


def test_what_a_run_names_is_no_path_and_no_pattern() -> None:
    for section, key, value in (
        ("instruction", "template", "/home/owner/private.toml"),
        ("instruction", "template", "../other"),
        ("lora", "modules", [".*"]),
        ("lora", "modules", []),
    ):
        data: dict[str, Any] = {"lora": {}, "instruction": {}}
        data[section] = {key: value}
        with pytest.raises(ConfigError, match=f"{section}.{key}"):
            validate(data, RunConfig, where="run.toml")


def test_an_output_layer_is_never_adapted(tmp_path: Path) -> None:
    from tests.unit.language.conftest import build_causal

    untied = build_causal(tmp_path / "llama", "llama", tie_word_embeddings=False)
    with pytest.raises(ModelError, match="tells the words"):
        adapter_tensors(untied, LORA.model_copy(update={"modules": ("lm_head",)}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules"),
        ({"init_lora_weights": "pissa"}, "changes the base's own weights"),
        ({"a_new_setting": 1}, "a_new_setting = 1"),
    ],
)
def test_a_folder_of_another_kind_is_refused(
    tiny_causal: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    save_adapter(tiny_causal, LORA, drawn(tiny_causal), tmp_path / "a", "")
    path = tmp_path / "a" / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=said):
        load_adapter(tmp_path / "a")


def test_a_damaged_folder_is_refused(tiny_causal: Path, tmp_path: Path) -> None:
    save_adapter(tiny_causal, LORA, drawn(tiny_causal), tmp_path / "a", "")
    path, tensors = tmp_path / "a" / WEIGHTS_FILE, load_file(tmp_path / "a" / WEIGHTS_FILE)
    for said, wrong in {
        r"no tensor '.*q_proj\.lora_A": without(tensors, NAME.format("A")),
        "extra tensor 'strange'": {**tensors, "strange": torch.zeros(1)},
        r"expected shape \[3, 32\] .* got \[4, 32\]": {
            **tensors,
            NAME.format("A"): torch.zeros(4, 32),
        },
        "no tensor of the target module 'down_proj'": {
            name: tensor for name, tensor in tensors.items() if "q_proj" in name
        },
        "NaN or infinite": {**tensors, NAME.format("B"): torch.full((32, 3), torch.nan)},
        "no tensors": {},
    }.items():
        save_file(wrong, path)
        with pytest.raises(VectorError, match=said):
            load_adapter(tmp_path / "a")
    path.unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_adapter(tmp_path / "a")
    (tmp_path / "a" / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}')
    path.touch()
    with pytest.raises(ModelError, match="r: expected a number above 0, got 0"):
        load_adapter(tmp_path / "a")
