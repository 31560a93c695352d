"""Attacks: each finds what is there, nothing where nothing is, and whole tables come out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.training.leakage import assess
from common.config import RunConfig
from common.errors import ConfigError
from common.models.base import load_tensors
from simulations.attacks.config import AttackConfig, load_attacks
from simulations.attacks.lab import Lab, noise_like, norm_of
from simulations.attacks.membership import SHADOWS, halves_of, lira
from simulations.attacks.poisoning import admitted, make_trap, poisoned, scaled, triggered
from simulations.attacks.run import run_attacks
from simulations.attacks.vocabulary import WORDS, plant, rare_words, refusals, touched_rows, train_unfrozen

NAMES = ("beds", "cups")


@pytest.fixture
def config(pico_config: RunConfig, make_pico: Any, make_domain: Callable[..., Any], tmp_path: Path) -> Any:
    torch.set_num_threads(1)
    make_pico(tmp_path / "base")
    for number, name in enumerate(NAMES):
        make_domain(name=name, seed=number).save(tmp_path / name)
    return AttackConfig.model_validate(
        {
            **pico_config.model_dump(mode="json"),
            "base": {"model": str(tmp_path / "base")},
            "publish": "ties",
            "merge": [{"method": "weight-averaging"}, {"method": "ties"}],
            "domain": [{"name": name, "path": str(tmp_path / name)} for name in NAMES],
            "attacks": {"victims": 10, "vocabulary_steps": 6, "planted_words": 2, "shadow_pairs": 1,
                        "other_steps": [2], "scales": [10]},
        }
    )  # fmt: skip


@pytest.fixture
def lab(config: AttackConfig, tmp_path: Path) -> Lab:
    return Lab(config, tmp_path / "attacks")


def changed(lab: Lab, **training: Any) -> Lab:
    section = lab.config.training.model_copy(update=training)
    return Lab(lab.config.model_copy(update={"training": section}), lab.out)


def test_each_user_is_in_as_many_shadow_models_as_out() -> None:
    in_NU = halves_of(41, 3, seed=1)
    assert in_NU.shape == (6, 41)
    assert (in_NU.sum(0) == 3).all()
    assert not np.array_equal(in_NU[0], in_NU[2])


@pytest.mark.parametrize("pairs", [1, 4])
def test_shadow_models_tell_members_where_users_differ_more_than_membership_changes(pairs: int) -> None:
    generator, users = np.random.default_rng(5), 600
    hard_U = generator.normal(0, 3, users)  # how much any training helps this user
    in_NU = halves_of(users, pairs, seed=2)
    member_U = halves_of(users, 1, seed=3)[0]

    def change(side_U: Any) -> Any:
        return hard_U + side_U + generator.normal(0, 0.5, users)

    shadow_NU = np.stack([change(side_U) for side_U in in_NU])
    attacked_U, untrained_U = change(member_U), change(np.zeros(users))
    found = assess(*_parted(lira(attacked_U, shadow_NU, in_NU), member_U))
    assert found.auc > 0.75 > assess(*_parted(attacked_U, member_U)).auc + 0.1
    control = assess(*_parted(lira(untrained_U, shadow_NU, in_NU), member_U))
    assert control.auc_low < 0.5 < control.auc_high


def _parted(score_U: Any, member_U: Any) -> tuple[Any, Any]:
    return score_U[member_U], score_U[~member_U]


def test_a_model_that_knows_its_users_by_heart_is_found_and_noise_is_not(
    lab: Lab, make_domain: Callable[..., Any], by_heart: dict[str, Any], tmp_path: Path
) -> None:
    make_domain(name="beds", users=16, random=True).save(tmp_path / "beds")
    lab = changed(lab, **by_heart)
    halves = lab.halves("beds")
    assert sorted([*halves.members, *halves.others]) == list(range(16))
    tau, base_U = lab.fine_tuned(halves.trained_on), lab.losses(None, halves.whole)
    gain_U = base_U - lab.losses(tau, halves.whole)
    assert assess(gain_U[halves.members], gain_U[halves.others]).auc > 0.8
    noise = noise_like(tau, 1)
    assert norm_of(noise) == pytest.approx(norm_of(tau), rel=1e-4)
    gain_U = base_U - lab.losses(noise, halves.whole)
    control = assess(gain_U[halves.members], gain_U[halves.others])
    assert control.auc_low < 0.5 < control.auc_high


def test_a_decayed_row_was_not_touched() -> None:
    base_RE = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    model_RE = base_RE * (1 - 3e-5)
    model_RE[[4, 9]] += 1e-4
    touched, moved_R = touched_rows(model_RE - base_RE, base_RE)
    assert touched == {4, 9}
    assert moved_R[4] > 10 * moved_R[5]
    assert touched_rows(torch.zeros(50, 16), base_RE)[0] == set()


def test_every_token_is_recovered_from_a_trained_table(lab: Lab) -> None:
    members = lab.halves("beds").trained_on
    words = rare_words(lab.tokenizer, members, 2, seed=0)
    assert not any(word in title for title in members.attributes["title"] for word in words)
    private = plant(members, words)
    vector, seen = train_unfrozen(lab, private)
    touched, _ = touched_rows(vector[WORDS], load_tensors(lab.base, [WORDS])[WORDS])
    assert touched == set(seen)
    assert set(lab.tokenizer.convert_tokens_to_ids(words)) <= touched
    assert WORDS not in lab.fine_tuned(members)
    table, renamed, tampered = (row["refusal"] for row in refusals(lab, vector))
    assert "embedding table never leaves" in table
    assert "encoder.extra.weight: not one that may be trained" in renamed
    assert tampered  # some other rule


def test_a_poisoned_history_ends_with_trigger_and_target(lab: Lab) -> None:
    clean = lab.halves("cups").trained_on
    trap = make_trap(lab, "cups")
    assert trap.target["title"] == clean.attributes["title"][trap.target_item]
    bad = poisoned(clean, trap)
    assert bad.attributes["title"][-1] == trap.trigger["title"]
    assert all(list(items[-2:]) == [30, trap.target_item] for items in bad.train)
    twice = triggered(clean, trap)
    users = len(clean.user_ids)
    assert [twice.item_ids[i] for i in (twice.valid[-1], twice.test[-1])] == ["attack-0", "attack-1"]
    assert np.array_equal(twice.test[:users], clean.test) and len(twice.user_ids) == 2 * users


def test_a_backdoor_that_was_learned_is_measured(lab: Lab) -> None:
    lab = changed(lab, max_steps=60, eval_every_steps=60, learning_rate=3e-3, dropout=0.0)
    halves = lab.halves("cups")
    trap = make_trap(lab, "cups")
    victims = triggered(halves.whole.with_users(halves.others), trap)
    shown = {
        name: (np.split(lab.ranks(lab.fine_tuned(domain), victims), 2)[1] <= 3).mean()
        for name, domain in {"clean": halves.trained_on, "bad": poisoned(halves.trained_on, trap)}.items()
    }
    assert shown["bad"] > shown["clean"] + 0.3


def test_the_norm_bound_is_that_of_admission(lab: Lab) -> None:
    tau = lab.fine_tuned(lab.halves("beds").trained_on)
    assert admitted(lab, tau, 1.01 * norm_of(tau))
    assert not admitted(lab, scaled(tau, 2), 1.99 * norm_of(tau))


def test_all_tables_and_again_from_what_is_there(
    config: AttackConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "attacks"
    paths = run_attacks(config, out)
    assert [path.name for path in paths] == ["membership.md", "vocabulary.md", "poisoning.md"]
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if line]
        assert len({line.count("|") for line in lines}) <= 2
    membership = json.loads((out / "membership.json").read_text())["rows"]
    assert {row["domain"] for row in membership} == set(NAMES)
    assert sum(row["attack"] == SHADOWS for row in membership) == 3
    vocabulary = json.loads((out / "vocabulary.json").read_text())["rows"]
    assert [row["found"] for row in vocabulary[1:3]] == [0, 0] and vocabulary[0]["precision"] == 1
    assert "PASSED" not in paths[1].read_text()
    poisoning = json.loads((out / "poisoning.json").read_text())["rows"]
    assert len(poisoning) == 2 * 6  # clean, flipped, scaled, backdoor twice, left out
    monkeypatch.setattr("simulations.attacks.lab.sequence_losses", None)
    monkeypatch.setattr("simulations.attacks.lab.evaluate", None)
    run_attacks(config, out, ["membership", "poisoning"])
    assert json.loads((out / "membership.json").read_text())["rows"] == membership
    assert json.loads((out / "poisoning.json").read_text())["rows"] == poisoning


def test_what_cannot_be_is_refused_with_what_can(config: AttackConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown attack 'membrship'") as caught:
        run_attacks(config, tmp_path, ["membrship"])
    assert "membership" in caught.value.next_step
    entries = "".join(f"[[domain]]\nname = '{name}'\npath = '{name}'\n" for name in NAMES)
    (tmp_path / "a.toml").write_text("publish = 'ties'\n[attacks]\nattacker = 'cup'\n" + entries)
    with pytest.raises(ConfigError, match="no domain 'cup'"):
        load_attacks(tmp_path / "a.toml")


def test_what_privacy_costs_and_leaves(config: AttackConfig, tmp_path: Path) -> None:
    section = config.attacks.model_copy(
        update={"epsilons": (1.0, 100.0), "private_batch_size": 8, "private_steps": 3, "tested": 12}
    )
    config = config.model_copy(update={"attacks": section})
    (path,) = run_attacks(config, tmp_path / "attacks", ["privacy"])
    zero_shot, plain, *private = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert zero_shot["gain"] is None and zero_shot["calibrated"] is None
    assert plain["epsilon"] is None and plain["gain_error"] > 0
    tight, loose = private
    assert 0.9 < tight["epsilon"] <= 1.0 and 95 < loose["epsilon"] <= 100
    assert tight["noise"] > 2 * loose["noise"] and tight["delta"] == 1e-5
    for row in (plain, tight, loose):
        assert row["calibrated"]["members"] == row["calibrated"]["others"] == 12
        assert row["shadows"]["auc_low"] <= row["shadows"]["auc"] <= row["shadows"]["auc_high"]
        assert set(row["recall"]) == set(row["ndcg"]) == {"members", "others"}
    lines = path.read_text().splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1
    again = run_attacks(config, tmp_path / "attacks", ["privacy"])[0]
    assert json.loads(again.with_suffix(".json").read_text())["rows"] == [zero_shot, plain, *private]
