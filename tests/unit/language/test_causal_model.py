"""Causal model folders: what loads and what is refused, and LoRA layers in and out of a model."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config import LoraSection
from common.errors import ModelError, VectorError
from common.language.adapters import adapter_tensors, initial_adapter, save_adapter
from common.language.model import load_causal

LORA = LoraSection(rank=4, alpha=8.0, modules=("q_proj", "down_proj"))


def random_adapter(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = adapter_tensors(folder, LORA)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in table.items()}


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm.model(input_ids=torch.tensor([lm.encode("small red cup")])).logits
    return found


def test_adapters_go_in_and_out(lm: Any, tiny_causal: Path, tmp_path: Path) -> None:
    plain = logits(lm)
    lm.attach(LORA, initial_adapter(adapter_tensors(tiny_causal, LORA), seed=0))
    assert torch.equal(logits(lm), plain)  # B is zero
    adapters = [random_adapter(tiny_causal, seed) for seed in (1, 2)]
    seen = []
    for adapter in adapters:
        lm.set_adapter(adapter)
        seen.append(logits(lm))
        assert all(torch.equal(tensor, adapter[name]) for name, tensor in lm.adapter().items())
    assert not torch.allclose(seen[0], seen[1])

    from peft import PeftModel

    save_adapter(tiny_causal, LORA, adapters[1], tmp_path / "adapter", readme="a test")
    base = AutoModelForCausalLM.from_pretrained(tiny_causal)
    other = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = other(input_ids=torch.tensor([lm.encode("small red cup")])).logits
    torch.testing.assert_close(seen[1], theirs)

    lm.attach(LORA, adapters[0])  # again, after another
    assert torch.equal(logits(lm), seen[0])
    lm.detach()
    assert torch.equal(logits(lm), plain)
    with pytest.raises(ModelError, match="no LoRA layers"):
        lm.set_adapter(adapters[0])


def test_libraries_do_not_chatter(lm: Any, tiny_causal: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.attach(LORA, random_adapter(tiny_causal, 1))


def test_gradients_reach_the_adapter_alone(lm: Any, tiny_causal: Path) -> None:
    lm.attach(LORA, random_adapter(tiny_causal, 1))
    lm.model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in lm.lora_parameters().values())
    trainable = sum(parameter.requires_grad for parameter in lm.model.parameters())
    assert trainable == len(lm.lora_parameters())


def test_wrong_adapters_are_named(lm: Any, tiny_causal: Path) -> None:
    lm.attach(LORA)
    good = random_adapter(tiny_causal, 1)
    first = min(good)
    for bad, words in (
        ({**good, first: good[first][:2]}, "rank 2, expected 4"),
        ({**good, "x.lora_A.weight": good[first]}, "extra tensor 'x.lora_A"),
        ({name: good[name] for name in list(good)[1:]}, "is missing"),
        ({**good, first: good[first] * float("nan")}, "NaN"),
    ):
        with pytest.raises(VectorError, match=words):
            lm.set_adapter(bad)
    with pytest.raises(ModelError, match="LoRA does not fit"):
        lm.attach(LoraSection(modules=("query",)))


def test_wrong_folders_are_named(tiny_causal: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_causal(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(tiny_causal, folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot load"):
        load_causal(folder, precision="fp32")
    shutil.copytree(tiny_causal, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="missing from the file"):
        load_causal(folder, precision="fp32")
