"""LoRA on encoders: the vector is the adapter, the base stays, and what is loaded embeds what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clients.training.adapters import AdapterTower, load_adapted
from clients.training.evaluate import evaluate
from clients.training.fit import check_frozen, fine_tune, load_encoder
from clients.training.trainer import EncoderTrainer
from common.config import RunConfig
from common.crossing import crossing_tensors
from common.errors import ModelError
from common.language.adapters import initial_adapter, load_adapter
from common.models.encoder import Encoder
from common.vectors import read_vector


def with_lora(config: RunConfig, **training: Any) -> RunConfig:
    record = config.model_dump(mode="json", exclude={"merge", "publish"})
    record["lora"] = {"rank": 4, "alpha": 8, "modules": ["query", "value"]}
    record["training"] |= training
    return RunConfig.model_validate(record)


def test_an_encoder_learns_by_adapters(
    pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    config = with_lora(
        pico_config, max_steps=60, eval_every_steps=30, checkpoint_every_steps=60, learning_rate=1e-2
    )
    table = crossing_tensors(pico_model, config)
    assert len(table) == 2 * 2 * 2
    result = fine_tune(pico_domain, pico_model, config, tmp_path)
    sent = read_vector(result.vector_path, table, "fp32")
    adapter = load_adapter(result.model_folder)[1]
    first = initial_adapter(table, config.run.seed)
    assert all(torch.equal(sent[name], adapter[name]) for name in table)
    assert all(not torch.equal(sent[name], first[name]) for name in table)
    before = evaluate(Encoder.load(pico_model), pico_domain, config, "valid").metrics["ndcg@10"]
    own = evaluate(load_adapted(result.model_folder), pico_domain, config, "valid").metrics["ndcg@10"]
    assert own == pytest.approx(result.validation_ndcg, abs=1e-6) and own > before


def test_peft_embeds_the_same(
    pico_domain: Any, pico_model: Path, pico_config: RunConfig, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    result = fine_tune(pico_domain, pico_model, with_lora(pico_config, max_steps=4), tmp_path)
    ours = load_adapted(result.model_folder)
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(pico_model), result.model_folder).eval()
    ids_BT, mask_BT = ours.batch([[2, 20, 21, 3], [2, 30, 3]])
    with torch.no_grad():
        expected = theirs(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        found = ours.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_kill_changes_no_bit(
    pico_domain: Any,
    pico_model: Path,
    pico_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, real = with_lora(pico_config), EncoderTrainer.training_step
    smooth = fine_tune(pico_domain, pico_model, config, tmp_path / "smooth")

    def dying(self: EncoderTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EncoderTrainer, "training_step", dying)
        fine_tune(pico_domain, pico_model, config, tmp_path / "killed")
    resumed = fine_tune(pico_domain, pico_model, config, tmp_path / "killed")
    assert resumed.resumed and resumed.vector_sha256 == smooth.vector_sha256


def test_the_base_is_held_frozen(pico_model: Path, pico_config: RunConfig) -> None:
    config = with_lora(pico_config)
    encoder = load_encoder(pico_model, config)
    tower = AdapterTower(encoder, pico_model, config)
    trains = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert len(trains) == 8 and all(".lora_" in name for name in trains)
    check_frozen(tower, pico_model)
    with torch.no_grad():
        encoder.model.get_parameter("encoder.layer.0.attention.self.query.base_layer.weight")[0, 0] += 1.0
    with pytest.raises(ModelError, match="query"):
        check_frozen(tower, pico_model)
