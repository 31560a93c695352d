"""The weights of a cocktail: their gradient through a whole model, what is learned, and no label read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import LoraSection
from common.errors import DataError, IsthmusError, ModelError, VectorError
from common.language import cocktail
from common.language.adapters import Adapter, adapter_tensors, initial_adapter
from common.language.cocktail import mix_by_entropy, prompts_of, unlabelled
from common.language.mixing import Mixture, mix
from common.language.options import CocktailOptions
from common.language.prompts import Template
from common.language.records import Ranking, YesNo
from common.language.scoring import answer_losses, first_token_entropies
from common.learning_state import read_trajectory

LORA = LoraSection(rank=2, alpha=4.0, modules=("q_proj", "down_proj"))
QUICK = CocktailOptions(steps=6, batch_size=3, prompts=6, evaluate_every_steps=2, learning_rate=0.2)
TITLES = ("red cup", "green tea", "oak table", "bike", "drum", "ball", "lamp", "boat 9")


@pytest.fixture
def template() -> Template:
    return Template.load()


@pytest.fixture
def adapters(tiny_causal: Path) -> dict[str, Adapter]:
    """A base spirit and an ingredient of random values, not alike in size."""
    return {"g": random_adapter(tiny_causal, 1, 0.1), "s": random_adapter(tiny_causal, 2, 0.5)}


def random_adapter(base: Path, seed: int, size: float) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    table = adapter_tensors(base, LORA)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in table.items()}


def trained(lm: Any, base: Path, template: Template) -> Adapter:
    """An ingredient that has learned one answer to any prompt, and so is sure of itself."""
    pairs = [(template.ranking_prompt(record), TITLES[0]) for record in records(2)]
    lm.attach(LORA, initial_adapter(adapter_tensors(base, LORA), seed=0))
    try:
        adam = torch.optim.Adam(lm.lora_parameters().values(), lr=0.03)
        for _ in range(40):
            adam.zero_grad()
            answer_losses(lm, pairs).mean().backward()
            adam.step()
        return lm.adapter()
    finally:
        lm.detach()


def records(count: int = 6) -> list[Ranking]:
    return [
        Ranking(f"u{n}", TITLES[: 1 + n % 4], tuple(TITLES[(n + k) % 8] for k in range(4)), None)
        for n in range(count)
    ]


@pytest.mark.parametrize("constraint", ["simplex", "free"])
@pytest.mark.parametrize("granularity", ["domain", "layer"])
@pytest.mark.parametrize("rule", ["factors", "product"])
def test_the_gradient_through_the_model_is_autograds(
    lm: Any, adapters: dict[str, Adapter], template: Template, rule: Any, granularity: Any, constraint: Any
) -> None:
    """Against one graph from the values through softmax, mix and model to the entropy."""
    mixture = Mixture(adapters, rule, granularity)
    lora = LORA.model_copy(update={"rank": mixture.rank, "alpha": LORA.scaling * mixture.rank})
    prompts = prompts_of(lm, template, records(3), 500)
    values_GD = torch.tensor([[0.3, -0.2], [0.1, 0.4], [0.0, 0.2]])[: len(mixture.groups)].requires_grad_()
    weights_GD = values_GD.softmax(1) if constraint == "simplex" else values_GD

    lm.attach(lora)
    lm.set_adapter(mixture.at(weights_GD))
    parameters = lm.lora_parameters()
    loss = first_token_entropies(lm, prompts, 3).mean()
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    of_weights_GD = mixture.gradient(dict(zip(parameters, grads, strict=True))).float()
    (got_GD,) = torch.autograd.grad(weights_GD, values_GD, of_weights_GD, retain_graph=True)

    mixed = {}
    for name in adapters["g"]:
        w_D = weights_GD[mixture.groups.index(f"layer-{name.split('.')[4]}") if granularity == "layer" else 0]
        parts = [adapter[name] for adapter in adapters.values()]
        if rule == "factors":
            mixed[name] = sum(w * part for w, part in zip(w_D, parts, strict=True))
        elif ".lora_A." in name:
            mixed[name] = torch.cat([w * part for w, part in zip(w_D, parts, strict=True)])
        else:
            mixed[name] = torch.cat(parts, 1)
    for name, module in lm.model.named_modules():
        if hasattr(module, "lora_A"):
            for letter in "AB":
                holder = getattr(module, f"lora_{letter}")["default"]
                value = mixed[f"base_model.model.{name}.lora_{letter}.weight"]
                del holder.weight
                holder.weight = value
    (expected_GD,) = torch.autograd.grad(first_token_entropies(lm, prompts, 3).mean(), values_GD)
    assert float(expected_GD.abs().max()) > 1e-4
    torch.testing.assert_close(got_GD, expected_GD, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rule", ["factors", "product"])
def test_entropy_falls_and_the_weights_stay_in_the_simplex(
    lm: Any, tiny_causal: Path, adapters: dict[str, Adapter], template: Template, tmp_path: Path, rule: Any
) -> None:
    adapters["s"] = trained(lm, tiny_causal, template)
    changed = {"rule": rule, "learning_rate": 0.0, "steps": 12, "prompts": 12, "holdout": 0.5}
    options = QUICK.model_copy(update=changed)
    made = mix_by_entropy(lm, "base", LORA, adapters, template, records(12), options, tmp_path)
    losses = made.facts["held_back_loss"]
    assert losses["learned"] < losses["equal"] - 0.1
    assert losses["alone"]["s"] < losses["alone"]["g"] and made.weights["all"]["s"] > 0.6
    assert set(losses["alone"]) == {"g", "s"} and set(made.facts["tried"]) == {"0.03", "0.1", "0.3"}
    assert made.facts["tried"][f"{made.facts['learning_rate']:g}"] == min(made.facts["tried"].values())
    lines = read_trajectory(made.trajectory_path)
    assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) == made.facts[
        "steps"
    ] + 1
    assert lines[0]["coefficients"] == {"all": {"g": 0.5, "s": 0.5}}
    for line in lines:
        weights = list(line["coefficients"]["all"].values())
        assert sum(weights) == pytest.approx(1, abs=1e-6) and min(weights) >= 0
    expected = mix(adapters, list(made.weights["all"].values()), rule)
    for name, tensor in expected.items():
        torch.testing.assert_close(made.adapter[name], tensor)
    assert made.lora.scaling == LORA.scaling and made.lora.rank == (4 if rule == "product" else 2)
    with pytest.raises(ModelError, match="no LoRA layers"):
        lm.lora_parameters()  # the model is as it was


def test_the_product_can_be_cut_to_the_rank(
    lm: Any, adapters: dict[str, Adapter], template: Template, tmp_path: Path
) -> None:
    options = QUICK.model_copy(update={"rule": "product", "steps": 2})
    made = mix_by_entropy(lm, "base", LORA, adapters, template, records(), options, tmp_path, rank=2)
    assert made.lora == LORA and 0 < made.facts["largest_residual"] < 1
    assert {name: tuple(t.shape) for name, t in made.adapter.items()} == {
        name: tuple(t.shape) for name, t in adapters["g"].items()
    }


@pytest.mark.parametrize("rule", ["factors", "product"])
def test_identical_adapters_give_the_adapter(
    lm: Any, adapters: dict[str, Adapter], template: Template, tmp_path: Path, rule: Any
) -> None:
    same = {"g": adapters["s"], "s": dict(adapters["s"])}
    options = QUICK.model_copy(update={"rule": rule})
    made = mix_by_entropy(lm, "base", LORA, same, template, records(), options, tmp_path, rank=2)
    for path in {name.split(".lora_")[0] for name in made.adapter}:
        got, expected = (
            a[f"{path}.lora_B.weight"] @ a[f"{path}.lora_A.weight"] for a in (made.adapter, adapters["s"])
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_killed_and_called_again_it_ends_alike(
    lm: Any, adapters: dict[str, Adapter], template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QUICK.model_copy(update={"steps": 12, "patience": 9})
    whole = mix_by_entropy(lm, "base", LORA, adapters, template, records(), options, tmp_path / "whole")
    calls = 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 13:  # within step 8: the state was saved at step 5
            raise KeyboardInterrupt
        return first_token_entropies(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cocktail, "first_token_entropies", dying)
        mix_by_entropy(lm, "base", LORA, adapters, template, records(), options, tmp_path / "killed")
    saved = json.loads((tmp_path / "killed" / "rate-0.2" / "state.json").read_text())
    assert saved["step"] == 5
    again = mix_by_entropy(lm, "base", LORA, adapters, template, records(), options, tmp_path / "killed")
    assert again.weights == whole.weights
    assert read_trajectory(again.trajectory_path) == read_trajectory(whole.trajectory_path)
    steps = [line["step"] for line in read_trajectory(again.trajectory_path)]

    def dead(*arguments: Any) -> Any:
        raise AssertionError(arguments)

    monkeypatch.setattr(cocktail._Run, "_step", dead)
    done = mix_by_entropy(lm, "base", LORA, adapters, template, records(), options, tmp_path / "killed")
    assert done.weights == whole.weights and steps[-1] == 12  # nothing was learned again


def test_other_inputs_begin_anew(
    lm: Any, adapters: dict[str, Adapter], template: Template, tmp_path: Path
) -> None:
    first = mix_by_entropy(lm, "base", LORA, adapters, template, records(), QUICK, tmp_path)
    adapters["g"] = {name: -tensor for name, tensor in adapters["g"].items()}
    other = mix_by_entropy(lm, "base", LORA, adapters, template, records(), QUICK, tmp_path)
    assert other.weights != first.weights


def test_a_label_is_refused_and_changes_nothing(
    lm: Any, adapters: dict[str, Adapter], template: Template, tmp_path: Path
) -> None:
    """Labelled records are refused; without their labels the result is the same whatever the labels were."""
    results = []
    for target in (0, 3):
        labelled = [Ranking(r.user, r.history, r.candidates, target) for r in records()]
        with pytest.raises(DataError, match="record 0 has a label"):
            mix_by_entropy(lm, "base", LORA, adapters, template, labelled, QUICK, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        bare = unlabelled(labelled)
        assert all(record.target is None for record in bare)
        results.append(
            mix_by_entropy(lm, "base", LORA, adapters, template, bare, QUICK, tmp_path / str(target)).weights
        )
    assert results[0] == results[1]
    with pytest.raises(DataError, match="label"):
        prompts_of(lm, template, [YesNo("u", "tea?", None), YesNo("v", "tea?", False)], 100)
    assert unlabelled([YesNo("u", "tea?", True)]) == [YesNo("u", "tea?", None)]


def test_yes_no_questions_can_be_mixed_for(
    lm: Any, adapters: dict[str, Adapter], template: Template, tmp_path: Path
) -> None:
    questions = [YesNo(f"u{n}", f"Does who likes {title} like tea?", None) for n, title in enumerate(TITLES)]
    made = mix_by_entropy(lm, "base", LORA, adapters, template, questions, QUICK, tmp_path)
    assert made.facts["prompts"] == {"learned_from": 5, "held_back": 1}


@pytest.mark.parametrize(("count", "said"), [(0, "no prompts"), (1, "1 prompt to learn the weights from")])
def test_too_few_prompts_are_refused(
    lm: Any, adapters: dict[str, Adapter], template: Template, tmp_path: Path, count: int, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        mix_by_entropy(lm, "base", LORA, adapters, template, records(count), QUICK, tmp_path)


def test_adapters_that_do_not_fit_are_refused(
    lm: Any, adapters: dict[str, Adapter], template: Template, tmp_path: Path
) -> None:
    name = sorted(adapters["s"])[0]
    for value, said in ((float("nan"), "NaN"), (3e38, r"the loss is (nan|inf)")):
        bad = dict(adapters["s"])
        bad[name] = torch.full_like(bad[name], value)
        with pytest.raises(IsthmusError, match=said):
            mix_by_entropy(lm, "base", LORA, adapters | {"s": bad}, template, records(), QUICK, tmp_path)
    fewer = {name: tensor for name, tensor in adapters["g"].items() if "q_proj" in name}
    with pytest.raises(VectorError, match=r"tensor .*down_proj.* is missing"):
        mix_by_entropy(lm, "base", LORA, {"g": fewer, "s": fewer}, template, records(), QUICK, tmp_path)
