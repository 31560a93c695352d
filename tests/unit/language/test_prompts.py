"""Templates as data: what they make of a record, what of a user's own file is refused, what is cut to fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig, validate
from common.errors import ConfigError, DataError
from common.language.prompts import FOLDER, Template, template_names
from common.language.records import Ranking, YesNo
from common.language.samples import Sample

RANKING = Ranking("u", ("{braces}", "tea"), ("lamp", "pot", "50% cup", "mug"), target=2)


@pytest.mark.parametrize("name", template_names())
def test_our_templates(name: str) -> None:
    template = Template.load(name)
    prompt = template.ranking_prompt(RANKING)
    assert "- {braces}\n- tea\n" in prompt
    shown = [template.ranking.candidate_item.format(title=title) for title in RANKING.candidates]
    assert "\n".join(shown) + "\n" in prompt
    assert prompt.endswith("\n")
    assert template.yes_no_prompt(YesNo("u", "{Is} it?", None)).count("{Is} it?") == 1
    assert template.ranking_answer(RANKING).splitlines()[0].removeprefix("- ") == "50% cup"
    assert template.candidate_answers(RANKING)[1].strip("\n").removeprefix("- ") == "pot"


def test_answers_name_so_many_titles() -> None:
    template = Template.load("ranking")
    assert template.ranking_answer(RANKING) == "50% cup\nlamp\npot"
    every = template.model_copy(update={"answer_titles": 0})
    assert every.ranking_answer(RANKING) == "50% cup\nlamp\npot\nmug"
    assert Template.load("next").ranking_answer(RANKING) == "50% cup"
    with pytest.raises(DataError, match="without a target"):
        template.ranking_answer(Ranking("u", (), ("a", "b"), None))


def test_a_choice_names_the_other_candidates() -> None:
    template = Template.load("next")
    prompt, whole = template.ranking_prompt(RANKING), template.ranking_answer(RANKING)
    assert template.sample(RANKING) == Sample(prompt, whole)
    answer, *others = (template.candidate_answers(RANKING)[n] for n in (2, 0, 1, 3))
    assert template.sample(RANKING, "choice") == Sample(prompt, answer, tuple(others))
    several = Template.load("ranking").sample(RANKING, "choice")
    assert several.answer == "50% cup\n"  # more titles follow
    with pytest.raises(DataError, match="without a target"):
        template.sample(Ranking("u", (), ("a", "b"), None), "choice")


def own(tmp_path: Path, old: str, new: str) -> Path:
    text = (FOLDER / "ranking.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    return path


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = own(tmp_path, 'candidate_item = "- {title}"', 'candidate_item = "* {title};"')
    assert "* lamp;\n* pot;" in Template.load(path).ranking_prompt(RANKING)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("### Answer:\n", "### Answer: ", "may not end in a space"),
        ("{candidates}", "{cards}", "{candidates} and {history}"),
        ("{history}", "{history.__class__}", "no other place"),
        ("- {title}", "- {title!r}", "without format"),
        ("- {title}", "- {title", "brace"),
        ("answer_titles", "answer_title", "did you mean 'answer_titles'"),
        ('yes = "Yes"', 'yes = ""', "yes"),
    ],
)
def test_wrong_templates_are_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.toml") as caught:
        Template.load(own(tmp_path, old, new))
    assert words in str(caught.value)


def test_an_unknown_template_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ranking'"):
        Template.load("rankings")


@pytest.mark.parametrize("path", ["/etc/mine.toml", "mine.toml", "../templates/ranking"])
def test_a_run_cannot_name_a_path(path: str) -> None:
    with pytest.raises(ConfigError, match=r"instruction\.template"):
        validate({"instruction": {"template": path}, "lora": {}}, RunConfig, where="run")


@pytest.mark.parametrize(
    ("candidates", "target", "words"),
    [
        (("a",), 0, "1 candidates"),
        (("a", " "), 0, "candidate 1 of a ranking is empty"),
        (("Tea  pot", "cup", "tea Pot"), 0, "candidates 0 and 2 of a ranking have the same title"),
        (("a", "b"), 2, "there are 2"),
    ],
)
def test_wrong_rankings_are_named(candidates: tuple[str, ...], target: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Ranking("u", (), candidates, target)


def test_the_oldest_history_goes_first(lm: Any) -> None:
    template = Template.load("ranking")
    long = Ranking("u", tuple(f"item {n}" for n in range(30)), ("lamp", "pot"), 0)
    whole = len(lm.encode(template.ranking_prompt(long)))
    assert template.fit(long, lm.encode, whole) is long
    shorter = template.fit(long, lm.encode, whole - 1)
    assert shorter.history == long.history[1:]
    bare = len(lm.encode(template.ranking_prompt(Ranking("u", (), long.candidates, 0))))
    one = template.fit(long, lm.encode, bare + 10)
    assert one.history[-1:] == ("item 29",)
    assert len(lm.encode(template.ranking_prompt(one))) <= bare + 10
    assert template.fit(long, lm.encode, bare).history == ()
    with pytest.raises(DataError, match="without history"):
        template.fit(long, lm.encode, bare - 1)
