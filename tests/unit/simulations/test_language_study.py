"""Pretraining from catalogs and the tables on it, on tiny domains: resume, what is read, what loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.data.domain import Domain
from common.errors import ConfigError, DataError
from common.files import sha256_file
from common.language.prompts import Template
from common.language.records import title_key
from simulations.language.config import LanguageConfig
from simulations.language.lab import with_cold_items
from simulations.language.pretrain import END, HeldBack, Pretrainer, pretrain
from simulations.language.start import co_occurrence
from simulations.language.study import Cell, gains, markdown, run_language_study
from simulations.language.text import PseudoUsers, cut, split_catalogs

NAMES = ("beds", "cups")
KILLED_AT = 5


class KilledError(Exception):
    """Raised in the place of a kill."""


@pytest.fixture
def config(make_domain: Callable[..., Any], tmp_path: Path) -> LanguageConfig:
    torch.set_num_threads(1)
    for number, name in enumerate(NAMES):
        make_domain(name=name, seed=number, items=150).save(tmp_path / name)
    return LanguageConfig.model_validate(
        {
            "pretraining": {
                "vocabulary": 320, "hidden_size": 16, "layers": 1, "heads": 2, "key_value_heads": 1,
                "intermediate_size": 32, "candidates": 5, "history": 3, "steps": 8, "prompt_tokens": 100,
                "shelf_tokens": 64, "copy_tokens": 64, "held_back": 0.4, "held_back_prompts": 4,
                "evaluate_every_steps": 4, "checkpoint_every_steps": 2, "warmup_steps": 2,
            },
            "lora": {"rank": 2, "alpha": 4, "modules": ["q_proj", "down_proj"], "dropout": 0.0},
            "instruction": {"template": "shelf", "candidates": 4, "history_items": 3},
            "training": {
                "batch_size": 4, "max_steps": 2, "eval_every_steps": 2, "warmup_steps": 0,
                "checkpoint_every_steps": 2, "validation_users": 4, "precision": "fp32",
            },
            "tables": {
                "test_users": 6, "cold_items": 0.2, "train_candidates": 3,
                "cocktail": {"prompts": 6, "steps": 2, "learning_rate": 0.1},
                "second_round_samples": 4, "parts": 3, "related": 2, "distractors": 1, "pools": [4],
                "samples": 3,
                "methods": ["base", "evo-merging"],
                "evolution": {"ratio_iterations": 1, "scale_iterations": 1, "population": 4},
            },
            "domain": [{"name": name, "path": str(tmp_path / name)} for name in NAMES],
        }
    )  # fmt: skip


def catalogs(config: LanguageConfig) -> dict[str, Any]:
    return {source.name: Domain.load(Path(source.path)).catalog() for source in config.domain}


def test_killed_and_resumed_it_is_the_same_model_and_it_loads(config: LanguageConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = pretrain(config, tmp_path / "whole")

    def kill(*, phase: str, step: int = 0, **_: Any) -> None:
        if step == KILLED_AT:
            raise KilledError

    with pytest.raises(KilledError):
        pretrain(config, tmp_path / "twice", kill)
    assert not (tmp_path / "twice" / "model").exists()
    seen: list[int] = []
    resumed = pretrain(config, tmp_path / "twice", lambda *, phase, step=0, **_: seen.append(step))
    assert seen[0] == KILLED_AT  # the checkpoint of step 4 was read
    assert sha256_file(resumed / "model.safetensors") == sha256_file(whole / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(whole)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert tokenizer.decode(tokenizer("- tea cup\n")["input_ids"]) == "- tea cup\n"
    assert model.config.vocab_size == len(tokenizer) and tokenizer.eos_token == END
    assert model.get_input_embeddings().weight.data_ptr() == model.lm_head.weight.data_ptr()
    with pytest.raises(ConfigError, match="another configuration"):
        pretrain(config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})}), whole.parent)


def test_interactions_change_nothing(config: LanguageConfig, tmp_path: Path) -> None:
    before = pretrain(config, tmp_path / "before")
    rng = np.random.default_rng(0)
    for source in config.domain:
        domain = Domain.load(Path(source.path))
        items = len(domain.item_ids)
        train = [rng.integers(items, size=len(history)).astype(np.int32) for history in domain.train]
        replace(domain, train=train, test=domain.valid, valid=domain.test).save(Path(source.path))
    after = pretrain(config, tmp_path / "after")
    assert sha256_file(after / "model.safetensors") == sha256_file(before / "model.safetensors")


def test_it_stops_early_where_held_back_loss_rises(
    config: LanguageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter([3.0, 2.0, 2.5, 2.25, 1.0])
    monkeypatch.setattr(Pretrainer, "evaluate", lambda self: HeldBack(next(said), 0.0))
    section = config.pretraining.model_copy(update={"patience": 2, "steps": 40})
    folder = pretrain(config.model_copy(update={"pretraining": section}), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "pretraining.json").read_text())
    assert lines[-1]["step"] == facts["steps"] == 16
    assert facts["held_back_loss"] == 2.0


def test_a_pseudo_user_wants_what_shares_its_theme(config: LanguageConfig) -> None:
    learned, held_back = split_catalogs(catalogs(config), 0.3, 0)
    for name, catalog in catalogs(config).items():
        assert sorted([*learned[name].item_ids, *held_back[name].item_ids]) == sorted(catalog.item_ids)
    users, rng = PseudoUsers(learned, 6), np.random.default_rng(0)
    themes = [set(group) for group in users.groups()]
    for _ in range(20):
        ranking = users.ranking(rng, 3, 4, noise=0.0)
        target = ranking.candidates[ranking.target or 0]
        own = [theme for theme in themes if {*ranking.history, target} <= theme]
        others = {title for title in ranking.candidates if title != target}
        assert any(not others & theme for theme in own)
        assert Template.load("shelf").ranking_prompt(ranking).endswith(f"- {ranking.history[-1]}\n")


def test_an_uninformed_answer_is_any_candidate(config: LanguageConfig) -> None:
    users, rng = PseudoUsers(catalogs(config), 6), np.random.default_rng(0)
    themes = [set(group) for group in users.groups()]
    fits = {0.0: 0, 0.5: 0, 1.0: 0}
    for informed in fits:
        for _ in range(200):
            ranking = users.ranking(rng, 3, 4, noise=0.0, informed=informed)
            target = ranking.candidates[ranking.target or 0]
            fits[informed] += any({*ranking.history, target} <= theme for theme in themes)
    assert fits[1.0] == 200
    assert 40 < fits[0.0] < 90 < fits[0.5] < 160  # a quarter of 200, and five eighths


def test_themes_come_in_one_order_in_every_process() -> None:
    code = (
        "from common.catalog import Catalog\n"
        "from simulations.language.text import PseudoUsers\n"
        "titles = ['oak spoon large plain', 'large oak spoon', 'plain spoon oak']\n"
        "catalog = Catalog('cups', ['a', 'b', 'c'], {'title': titles})\n"
        "print(list(PseudoUsers({'cups': catalog}, 6).groups()))\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in range(3)
    }  # fmt: skip
    assert len(found) == 1


def test_titles_are_cut_between_words() -> None:
    assert cut("Oak spoon, large, 2 pieces", 3) == "Oak spoon, large"


def test_tokens_that_share_groups_begin_alike() -> None:
    groups = [[[0, 1], [1, 2]], [[0], [2, 1]], [[3, 4]], [[4], [3]]]
    torch.manual_seed(0)
    embedding_VK = co_occurrence(groups, 6, 4)
    likeness_VV = embedding_VK @ embedding_VK.T
    assert float(likeness_VV[0, 1]) > 0.8 > 0.5 > float(likeness_VV[0, 3])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_an_untrained_model_goes_on_as_before(config: LanguageConfig, architecture: str) -> None:
    sizes = {"vocabulary": 400, "hidden_size": 128, "layers": 2, "heads": 2, "key_value_heads": 2}
    settings = config.pretraining.model_copy(update={"architecture": architecture, **sizes})
    model = Pretrainer(catalogs(config), settings, 0).model
    model.set_attn_implementation("eager")
    words = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:40] + 270
    with torch.no_grad():
        first_HTT, second_HTT = (
            layer[0] for layer in model(words.repeat(2)[None], output_attentions=True).attentions
        )
    place_T = torch.arange(41, 79)  # the second time, after its first token
    assert float(first_HTT[0, place_T, place_T - 1].mean()) > 0.8
    assert float(second_HTT[0, place_T, place_T - 39].mean()) > 0.2  # what came after it the first time


def test_a_copy_is_its_candidates_in_another_order(config: LanguageConfig) -> None:
    users, rng = PseudoUsers(catalogs(config), 6), np.random.default_rng(0)
    copies = [users.copy(rng, 4) for _ in range(10)]
    assert all(sorted(copy.history) == sorted(copy.candidates) for copy in copies)
    assert any(copy.history != copy.candidates for copy in copies)
    titles = users.copy(rng, 10**4).candidates
    assert len({title_key(title) for title in titles}) == len(titles)


def test_a_catalog_without_themes_is_refused() -> None:
    from common.catalog import Catalog

    with pytest.raises(DataError, match="no brand, category or word"):
        PseudoUsers({"beds": Catalog("beds", ["a", "b"], {"title": ["oak", "pine"]})}, 6)


def test_both_tables_are_made_once(config: LanguageConfig, tmp_path: Path) -> None:
    model = pretrain(config, tmp_path / "small")
    rows = {"cocktail": {"no adapter", "G", "S", "WA", "second round"}, "evolution": {"base", "evo-merging"}}
    columns = {
        "cocktail": {"beds warm", "beds cold", "cups warm", "cups cold"},
        "evolution": {"2 related", "2 + 1", "4 of all"},
    }
    for table in rows:
        path = run_language_study(table, config, model, tmp_path / "out", [0])
        cells = [Cell(**record) for record in json.loads(path.with_suffix(".json").read_text())]
        assert rows[table] <= {cell.row for cell in cells}
        assert {cell.column for cell in cells} == columns[table]
        assert all(0 <= cell.metrics["ndcg@1"] <= cell.metrics["ndcg@3"] <= 1 for cell in cells)
        made = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells" / table).iterdir()}
        assert run_language_study(table, config, model, tmp_path / "out", [0]).read_text() == path.read_text()
        assert {file: file.stat().st_mtime_ns for file in made} == made
    with pytest.raises(ConfigError, match="did you mean 'cocktail'"):
        run_language_study("cocktails", config, model, tmp_path / "out", [0])


def test_cold_items_are_in_no_sequence_before_the_test(make_domain: Callable[..., Any]) -> None:
    domain = make_domain(items=150)
    cold = with_cold_items(domain, 0.3, 0)
    seen = np.unique(np.concatenate([*cold.train, cold.valid]))
    before = np.unique(np.concatenate([*domain.train, domain.valid]))
    assert 0.5 * len(before) < len(seen) < 0.9 * len(before)
    assert 0 < np.isin(cold.test, seen, invert=True).sum() < len(cold.test)
    assert cold.item_ids == domain.item_ids and min(map(len, cold.train)) > 1
    for row, user in enumerate(cold.user_ids):
        own = domain.user_ids.index(user)
        items = [item for item in (*domain.train[own], domain.valid[own]) if item in seen]
        assert [*cold.train[row], cold.valid[row]] == items and cold.test[row] == domain.test[own]
    assert with_cold_items(domain, 0.0, 0) is domain


def test_gains_are_paired_by_column_and_seed() -> None:
    cells = [
        Cell(seed, column, row, {"ndcg@1": value, "ndcg@3": value}, {})
        for column, base in (("beds warm", 0.1), ("cups warm", 0.4), ("8 of all", 0.0))
        for seed in (0, 1)
        for row, value in (("no adapter", base), ("S", base + 0.01 * (1 + 2 * seed)))
    ]
    lines = gains(cells).splitlines()
    assert lines[0] == "| over no adapter | warm | 8 of all |"
    assert lines[-1] == "| S | +2.0 +- 0.6 (4) | +2.0 +- 1.0 (2) |"


def test_a_table_shows_mean_and_spread() -> None:
    cells = [
        Cell(seed, "beds warm", "S", {"ndcg@1": value, "ndcg@3": 2 * value}, {})
        for seed, value in enumerate((0.1, 0.2))
    ]
    assert markdown(cells).splitlines()[-1] == "| S | 15.0 / 30.0 (10.0 to 20.0) |"
