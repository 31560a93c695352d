"""Model folders: resolving, digests, what may train, saving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError, VectorError
from common.models.base import (
    load_tensors,
    model_digest,
    read_pooling,
    resolve_base,
    save_model,
    trainable_norm,
    trainable_tensors,
)
from common.models.encoder import Encoder

IDS = [[2, 60, 61, 62, 3], [2, 70, 3], [2, 80, 81, 82, 83, 84, 3]]


def test_embedded_base_is_found_and_pools_by_mean() -> None:
    folder = resolve_base("embedded")
    assert (folder / "model.safetensors").is_file()
    assert read_pooling(folder) == "mean"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        resolve_base(str(tmp_path))


def test_truncated_weights_are_refused(pico_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(pico_model, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4])
    with pytest.raises(ModelError, match="not a well-formed"):
        resolve_base(str(folder))


def test_digest_is_stable_and_sees_one_bit(pico_model: Path, tmp_path: Path) -> None:
    before = model_digest(pico_model)
    assert before == model_digest(pico_model)
    folder = tmp_path / "m"
    shutil.copytree(pico_model, folder)
    assert model_digest(folder) == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    assert model_digest(folder) != before


def test_digest_sees_config_and_tokenizer_but_not_library_versions(pico_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(pico_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}, indent=8))
    assert model_digest(folder) == model_digest(pico_model)
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert model_digest(folder) != model_digest(pico_model)
    shutil.copyfile(pico_model / "config.json", folder / "config.json")
    (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace('"spoon"', '"spork"')
    )
    assert model_digest(folder) != model_digest(pico_model)


def test_trainable_is_everything_but_tables_and_pooler(pico_model: Path) -> None:
    names = set(trainable_tensors(pico_model))
    everything = set(load_tensors(pico_model))
    assert everything - names == {
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    assert trainable_tensors(pico_model)["encoder.layer.0.attention.self.query.weight"] == (32, 32)


def test_a_table_with_a_row_for_each_token_never_trains(pico_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(pico_model, folder)
    tensors = load_file(folder / "model.safetensors")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    tensors["strange.table"] = torch.zeros(vocabulary, 3)
    save_file(tensors, folder / "model.safetensors")
    assert "strange.table" not in trainable_tensors(folder)


def test_saved_model_loads_everywhere_with_the_same_embeddings(
    pico_model: Path, pico_sentence_model: Path, tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import AutoModel

    for base in (pico_model, pico_sentence_model):
        out = tmp_path / base.name
        tensors = load_tensors(base, trainable_tensors(base))
        changed = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        save_model(base, changed, out, readme="# A test\n")
        encoder = Encoder.load(out)
        texts = ["title: red spoon, brand: acme", "blue lamp; green chair"]
        z_NE = encoder.encode([encoder.tokenizer(text)["input_ids"] for text in texts])
        other = sentence_transformers.SentenceTransformer(str(out), device="cpu")
        other_NE = other.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        assert torch.allclose(z_NE, other_NE, atol=1e-5)
        assert not torch.allclose(z_NE, Encoder.load(base).encode([IDS[0], IDS[1]]), atol=1e-3)
        model = AutoModel.from_pretrained(out, local_files_only=True)
        for name, tensor in changed.items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert (out / "README.md").read_text() == "# A test\n"
        assert read_pooling(out) == read_pooling(base)


def test_saving_twice_replaces_and_nothing_is_left_over(pico_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_model(pico_model, {}, out, readme="one")
    name = "encoder.layer.0.output.dense.bias"
    save_model(pico_model, {name: torch.ones(32)}, out, readme="two", pooling="cls")
    assert (out / "README.md").read_text() == "two"
    assert torch.equal(load_tensors(out, [name])[name], torch.ones(32))
    assert read_pooling(out) == "cls"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_saving_refuses_what_the_base_lacks(pico_model: Path, tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="'nonsense'"):
        save_model(pico_model, {"nonsense": torch.ones(1)}, tmp_path / "out", readme="")
    with pytest.raises(VectorError, match=r"\(31,\)"):
        save_model(
            pico_model, {"encoder.layer.0.output.dense.bias": torch.ones(31)}, tmp_path / "out", readme=""
        )
    assert not list(tmp_path.iterdir())


def test_unsupported_sentence_transformers_modules_are_refused(
    pico_sentence_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(pico_sentence_model, folder)
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ModelError, match="pooling"):
        read_pooling(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="Dense"):
        Encoder.load(folder)


def test_a_checkpoint_with_other_names_is_refused(make_pico: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_pico(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="save_pretrained"):
        Encoder.load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_what_trains(pico_model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_tensors(pico_model).items()}
    shutil.copytree(pico_model, tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    found = torch.cat([tensors[name].double().flatten() for name in trainable_tensors(pico_model)])
    assert trainable_norm(tmp_path / "model") == pytest.approx(float(found.norm()), rel=1e-6)
