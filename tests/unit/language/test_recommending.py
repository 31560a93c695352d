"""Recommendations by an adapted language model: what cannot be ranked is named or counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clients import cli
from clients import language as by_language
from clients.language import explain, rank_titles, shown_titles, unrankable
from clients.serving import left_out, write_settings
from common.config import RunConfig
from common.errors import DataError
from common.language.adapters import adapter_tensors, initial_adapter, save_adapter
from tests.unit.language.conftest import build_causal

CONFIG = RunConfig.model_validate(
    {
        "lora": {"rank": 2, "modules": ["q_proj"]},
        "instruction": {"candidates": 4, "history_items": 3},
        "training": {"precision": "fp32"},
    }
)
assert CONFIG.instruction is not None
FEW_WORDS = CONFIG.instruction.model_copy(update={"title_words": 5})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a model of 256 positions, as an owner has it installed."""
    folder = tmp_path_factory.mktemp("recommending")
    base, lora = build_causal(folder / "base", max_position_embeddings=256), CONFIG.lora
    assert lora is not None
    adapter = initial_adapter(adapter_tensors(base, lora), 0)
    save_adapter(base, lora, adapter, folder / "adapter", "", base_name=str(base))
    write_settings(folder / "adapter", CONFIG)
    return folder / "adapter"


@pytest.fixture(scope="module")
def domain(pico_domain: Any) -> Any:
    """Items 1 and 2 have one title, item 3 has none."""
    titles = [f"small thing {n}" for n in range(len(pico_domain.item_ids))]
    titles[2], titles[3] = titles[1].upper(), " "
    return dataclasses.replace(pico_domain, attributes={**pico_domain.attributes, "title": titles})


def test_items_that_titles_do_not_tell_apart_are_counted(model: Path, domain: Any) -> None:
    assert unrankable(shown_titles(domain, 0), range(6)) == {2: "same-title", 3: "no-title"}
    assert left_out(model, domain) == {"same-title": 1, "no-title": 1}
    found = rank_titles(model, domain, [0], 2, candidates=[1, 4, 5])
    assert len(found) == 2
    for wrong, said in (([1, 2, 4], "'i002': another candidate has the same"), ([3, 4], "'i003': it has no")):
        with pytest.raises(DataError, match=said):
            rank_titles(model, domain, [0], 2, candidates=wrong)
    assert not {2, 3} & {item for item, _ in rank_titles(model, domain, [0], 2)}


def test_a_history_is_what_training_showed(model: Path, domain: Any) -> None:
    """Items without title are nowhere in it, and older ones than the run's are not looked at."""
    plain = rank_titles(model, domain, [4, 5, 6], 3, candidates=[7, 8, 9])
    assert rank_titles(model, domain, [0, 4, 5, 3, 6], 3, candidates=[7, 8, 9]) == plain
    with pytest.raises(DataError, match="no item of the history has a title"):
        rank_titles(model, domain, [3], 3, candidates=[7, 8, 9])


def test_titles_are_cut_as_in_training(model: Path, domain: Any) -> None:
    titles = [f"{title} {'7 ' * 480}" for title in domain.attributes["title"]]
    long = dataclasses.replace(domain, attributes={**domain.attributes, "title": titles})
    short = dataclasses.replace(domain, attributes={**domain.attributes, "title": shown_titles(long, 5)})
    write_settings(model, CONFIG.model_copy(update={"instruction": FEW_WORDS}))
    try:
        found = rank_titles(model, long, [0], 3, candidates=[7, 8, 9])
        assert found == rank_titles(model, short, [0], 3, candidates=[7, 8, 9])
        assert isinstance(explain(model, long, [0], 7), str)
    finally:
        write_settings(model, CONFIG)


def test_an_explanation_of_a_long_history_fits(
    model: Path, domain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    told = by_language.generate

    def generate(lm: Any, given: list[str], tokens: int) -> list[str]:
        prompts.extend(given)
        return told(lm, given, tokens)

    monkeypatch.setattr(by_language, "generate", generate)
    titles = [f"{title} of {'many ' * 8}words" for title in domain.attributes["title"]]
    long = dataclasses.replace(domain, attributes={**domain.attributes, "title": titles})
    for given in (domain, long):
        assert isinstance(explain(model, given, list(range(4, 30)), 0), str)
    assert [prompt.count("\n- ") for prompt in prompts] in ([3, 1], [3, 2])  # three, or what has room


def test_the_command_says_what_is_left_out_and_when_there_are_too_few(
    model: Path, domain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain.save(tmp_path / "data")

    class Home:
        data_folder = tmp_path / "data"

    monkeypatch.setattr(cli, "_open", lambda home: Home)
    monkeypatch.setattr(cli, "_model", lambda home, name: model)
    runner = CliRunner()
    whole = runner.invoke(cli.app, ["recommend", "--history", "i000", "-k", "2"])
    assert whole.exit_code == 0, whole.output
    assert "items left out: 1 no-title, 1 same-title" in whole.stderr
    few = runner.invoke(cli.app, ["recommend", "--history", "i000", "-k", "9", "--candidates", "i001,i004"])
    assert "2 of 9 items, there are no others" in few.stderr and "left out" not in few.stderr
