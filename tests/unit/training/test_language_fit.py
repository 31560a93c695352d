"""LoRA fine-tuning of tiny causal models: what it writes, what stays frozen, what a kill changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clients.training.adapters import keep_few_activations
from clients.training.fit import fine_tune
from clients.training.job import ReleaseLimit
from clients.training.language import (
    AnswerTower,
    InstructionBatches,
    load_language,
    wear,
)
from clients.training.leakage import check_release, hold_out
from clients.training.ranking import evaluate_domain, user_losses
from clients.training.trainer import EncoderTrainer
from common.config import RunConfig
from common.crossing import crossing_tensors
from common.errors import ConfigError, DataError
from common.language.adapters import initial_adapter, load_adapter
from common.language.prompts import Template
from common.vectors import read_vector
from tests.unit.language.conftest import build_causal


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_causal(tmp_path_factory.mktemp("causal") / "qwen2")


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_causal(tmp_path_factory.mktemp("causal") / request.param, request.param)


def language_config(**training: Any) -> RunConfig:
    """Six steps on prompts of four candidates."""
    return RunConfig.model_validate(
        {
            "training": {
                "batch_size": 4, "max_steps": 6, "warmup_steps": 1, "learning_rate": 1e-2,
                "eval_every_steps": 3, "checkpoint_every_steps": 2, "precision": "fp32",
                "vector_codec": "fp32", "validation_users": 8, **training,
            },
            "lora": {"rank": 2, "alpha": 4, "modules": ["q_proj", "v_proj", "down_proj"]},
            "instruction": {"candidates": 4, "max_prompt_tokens": 512},
            "evaluation": {"max_users": 12},
        }
    )  # fmt: skip


def test_the_vector_is_the_adapter_and_the_folder_loads_in_peft(
    causal: Path, pico_domain: Any, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = language_config()
    result = fine_tune(pico_domain, causal, config, tmp_path)
    table = crossing_tensors(causal, config)
    sent = read_vector(result.vector_path, table, "fp32")
    lora, adapter = load_adapter(result.model_folder)
    assert (lora.rank, lora.alpha, lora.modules) == (2, 4.0, ("q_proj", "v_proj", "down_proj"))
    first = initial_adapter(table, config.run.seed)
    for name, tensor in sent.items():
        assert torch.equal(tensor, adapter[name])
        assert not torch.equal(tensor, first[name]), name
    assert (result.steps, result.resumed) == (6, False) and result.best_step in (3, 6)
    assert fine_tune(pico_domain, causal, config, tmp_path) == result

    ours = load_language(causal, config, result.model_folder, device="cpu")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal), result.model_folder)
    ids = torch.tensor([ours.encode("red cup\n- green tea")])
    with torch.no_grad():
        expected, base = theirs.eval()(ids).logits, theirs.get_base_model()
        assert torch.allclose(ours.model(ids).logits, expected, atol=1e-5)
        with theirs.disable_adapter():
            assert not torch.allclose(base(ids).logits, expected, atol=1e-3)


def test_training_learns_the_answers(qwen2: Path, pico_domain: Any, tmp_path: Path) -> None:
    config = language_config(max_steps=12, eval_every_steps=12, learning_rate=2e-2)
    result = fine_tune(pico_domain, qwen2, config, tmp_path)
    lm = load_language(qwen2, config, device="cpu")
    batch = InstructionBatches(lm, pico_domain, config)[0]
    tower = AnswerTower(lm).eval()
    with torch.no_grad():
        before = tower(**batch)["loss"]
        wear(lm, qwen2, config, result.model_folder)
        assert tower(**batch)["loss"] < before - 0.3


def test_a_base_in_bfloat16_has_adapters_in_float32(qwen2: Path, pico_domain: Any, tmp_path: Path) -> None:
    config = language_config(precision="bf16", max_steps=2, eval_every_steps=2)
    lm = load_language(qwen2, config, device="cpu")
    kinds = {".lora_" in name: parameter.dtype for name, parameter in lm.model.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    result = fine_tune(pico_domain, qwen2, config, tmp_path)
    sent = load_file(result.vector_path)
    first = initial_adapter(crossing_tensors(qwen2, config), config.run.seed)
    assert all(tensor.isfinite().all() and not torch.equal(tensor, first[n]) for n, tensor in sent.items())


def test_a_kill_changes_no_bit(
    qwen2: Path, pico_domain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = language_config(max_steps=4, eval_every_steps=2), EncoderTrainer.training_step
    smooth = fine_tune(pico_domain, qwen2, config, tmp_path / "smooth")

    def dying(self: EncoderTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EncoderTrainer, "training_step", dying)
        fine_tune(pico_domain, qwen2, config, tmp_path / "killed")
    resumed = fine_tune(pico_domain, qwen2, config, tmp_path / "killed")
    assert resumed.resumed
    assert resumed.vector_sha256 == smooth.vector_sha256


def test_only_answers_count_and_only_adapters_train(causal: Path, pico_domain: Any) -> None:
    config = language_config()
    lm = load_language(causal, config, device="cpu")
    tower = AnswerTower(lm)
    trains = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    assert trains and all(".lora_A." in name or ".lora_B." in name for name in trains)
    batch = InstructionBatches(lm, pico_domain, config)[0]
    assert len(batch["prompts"]) == 4
    one = {key: value[:1] for key, value in batch.items()}
    prompt, answer = one["prompts"][0], one["answers"][0]
    with torch.no_grad():
        logits_TV = lm.model(torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    expected = -logits_TV[rows, torch.tensor(answer)].mean()
    assert torch.allclose(tower(**one)["loss"].detach(), expected, atol=1e-5)
    assert "### Answer" not in lm.decode(answer)


def test_parts_of_a_step_give_the_gradient_of_the_step(qwen2: Path, pico_domain: Any, tmp_path: Path) -> None:
    found = []
    for at_once in (4, 3):
        config = language_config(max_steps=1, eval_every_steps=1, warmup_steps=0)
        assert config.instruction is not None and config.lora is not None
        instruction = config.instruction.model_copy(update={"prompts_at_once": at_once})
        lora = config.lora.model_copy(update={"dropout": 0.0})
        config = config.model_copy(update={"instruction": instruction, "lora": lora})
        result = fine_tune(pico_domain, qwen2, config, tmp_path / str(at_once))
        (line, *_) = (result.vector_path.parent / "metrics.jsonl").read_text().splitlines()
        found.append((load_file(result.vector_path), json.loads(line)["loss"]))
    (whole, loss), (parts, same_loss) = found
    assert same_loss == pytest.approx(loss, rel=1e-5)
    close = [torch.isclose(whole[name], parts[name], atol=1e-5).float().mean() for name in whole]
    assert min(close) > 0.95  # Adam's first step is a sign: values near zero may turn


def test_checkpointing_gives_the_same_gradient(qwen2: Path, pico_domain: Any) -> None:
    config = language_config()
    gradients = []
    for checkpointing in (False, True):
        lm = load_language(qwen2, config, device="cpu")
        if checkpointing:
            keep_few_activations(lm.model)
        tower = AnswerTower(lm)
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        tower.train()
        tower(**InstructionBatches(lm, pico_domain, config)[0])["loss"].backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_every_owner_begins_with_the_same_a(qwen2: Path) -> None:
    table = crossing_tensors(qwen2, language_config())
    first, again, other = (initial_adapter(table, seed) for seed in (0, 0, 1))
    for name in table:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (".lora_B." in name)


def test_evaluation_counts_ties_and_answers(qwen2: Path, pico_domain: Any) -> None:
    config = language_config()
    instruction = config.instruction
    assert instruction is not None
    config = config.model_copy(update={"instruction": instruction.model_copy(update={"generated_users": 2})})
    found = evaluate_domain(load_language(qwen2, config, device="cpu"), pico_domain, config)
    assert set(found.metrics) == {"ndcg@1", "ndcg@3", "recall@1", "recall@3", "recall@10", "valid-answers"}
    assert found.users == 12 and found.rank_U.min() >= 1 and found.rank_U.max() <= 4
    again = evaluate_domain(load_language(qwen2, config, device="cpu"), pico_domain, config)
    assert (found.rank_U == again.rank_U).all()


def test_a_prompt_that_no_cut_makes_fit_is_named(qwen2: Path, pico_domain: Any, tmp_path: Path) -> None:
    config = language_config()
    assert config.instruction is not None
    short = config.instruction.model_copy(update={"max_prompt_tokens": 16})
    with pytest.raises(DataError, match="prompt"):
        fine_tune(pico_domain, qwen2, config.model_copy(update={"instruction": short}), tmp_path)


def test_one_endless_title_stops_nobody(qwen2: Path, pico_domain: Any) -> None:
    """Titles are cut by default; whole ones of one item would stop training where a draw has it."""
    titles = ["7 " * 490, *pico_domain.attributes["title"][1:]]
    domain = replace(pico_domain, attributes={**pico_domain.attributes, "title": titles})
    config = language_config()
    assert config.instruction is not None
    whole = config.instruction.model_copy(update={"title_words": 0})
    lm = load_language(qwen2, config, device="cpu")
    batches = InstructionBatches(lm, domain, config)
    assert all(len(batches[step]["prompts"]) == 4 for step in range(6))
    evaluate_domain(lm, domain, config)
    user_losses(lm, domain, config)
    batches = InstructionBatches(lm, domain, config.model_copy(update={"instruction": whole}))
    with pytest.raises(DataError, match="without history"):
        [batches[step] for step in range(60)]


def test_a_causal_base_needs_its_sections(qwen2: Path, pico_model: Path) -> None:
    with pytest.raises(ConfigError, match="rank by instructions"):
        crossing_tensors(qwen2, RunConfig())
    with pytest.raises(ConfigError, match="not a causal language model"):
        crossing_tensors(pico_model, language_config())


def test_the_best_tensors_are_those_of_the_best_step(qwen2: Path, pico_domain: Any, tmp_path: Path) -> None:
    result = fine_tune(pico_domain, qwen2, language_config(max_steps=3, eval_every_steps=3), tmp_path)
    assert result.best_step == 3
    assert set(load_file(result.vector_path)) == set(crossing_tensors(qwen2, language_config()))
    assert Template.load("ranking").answer_titles == 3


def test_a_release_limit_is_held_against_an_adapter(qwen2: Path, pico_domain: Any, tmp_path: Path) -> None:
    config = language_config(max_steps=2, eval_every_steps=2)
    rows = hold_out(pico_domain, 10, config.run.seed)
    trained_on = pico_domain.with_users(rows[0])
    fitted = fine_tune(trained_on, qwen2, config, tmp_path)
    found = check_release(fitted, pico_domain, rows, qwen2, config, ReleaseLimit(max_tpr=1.0))
    assert (found.members, found.others) == (10, 10) and 0 <= found.auc <= 1
    lm = load_language(qwen2, config, device="cpu")
    loss_U = user_losses(lm, pico_domain, config)
    assert loss_U.shape == (len(pico_domain.user_ids),) and (loss_U > 0).all()
