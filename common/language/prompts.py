"""Templates: how a record becomes a prompt and an answer. Data, not code: a TOML file each.

Ours are in `templates/` and go by their names; a user's own goes by its path. Keys:

    description      one line for people
    answer_titles    how many titles an answer names, the relevant one first; 0: all candidates
    [ranking]        prompt with {history} and {candidates}; with {title}: history_item, candidate_item,
                     answer_item
    [yes_no]         prompt with {text}; the words `yes` and `no`

A leading line break of a prompt is dropped. A prompt may not end in a space: tokenizers would join it
with the first word of the answer, and training and scoring would see different tokens.

    >>> template = Template.load("ranking")
    >>> template.ranking_answer(Ranking("u", ("tea",), ("lamp", "pot"), target=1))
    'pot\\nlamp'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from string import Formatter

from pydantic import Field, field_validator

from common.config import Frozen, Objective, load_toml
from common.errors import ConfigError, DataError, suggest
from common.language.records import Ranking, YesNo
from common.language.samples import Sample

FOLDER = Path(__file__).parent / "templates"
DEFAULT_TEMPLATE = "ranking"
_TRAILING_SPACE = re.compile(r"[ \t]\Z")


class RankingSection(Frozen):
    """The texts of a ranking task."""

    prompt: str
    history_item: str = "- {title}"
    candidate_item: str = "- {title}"
    answer_item: str = "{title}"

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, text: str) -> str:
        return _checked(text, {"history", "candidates"})

    @field_validator("history_item", "candidate_item", "answer_item")
    @classmethod
    def _check_item(cls, text: str) -> str:
        _check_places(text, {"title"})
        if "\n" in text:
            raise ValueError("an item takes one line")
        return text


class YesNoSection(Frozen):
    """The texts of a question, and the two answers between which it is decided."""

    prompt: str
    yes: str = Field("Yes", min_length=1)
    no: str = Field("No", min_length=1)

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, text: str) -> str:
        return _checked(text, {"text"})


class Template(Frozen):
    """One template file, validated. Titles are put in as they are; braces in them mean nothing."""

    description: str = ""
    answer_titles: int = Field(3, ge=0)
    ranking: RankingSection
    yes_no: YesNoSection

    @classmethod
    def load(cls, name_or_path: str | Path = DEFAULT_TEMPLATE) -> Template:
        """One of ours by name, or a TOML file by path. Raises ConfigError naming file and key."""
        path = Path(name_or_path)
        if path.suffix == ".toml":
            return load_toml(path, cls)
        if str(name_or_path) not in template_names():
            raise ConfigError(
                f"no template {str(name_or_path)!r}",
                next_step=suggest(
                    str(name_or_path), template_names(), otherwise="one of {}, or the path of a .toml file"
                ),
            )
        return load_toml(FOLDER / f"{name_or_path}.toml", cls)

    @property
    def yes(self) -> str:
        """The answer that means yes."""
        return self.yes_no.yes

    @property
    def no(self) -> str:
        """The answer that means no."""
        return self.yes_no.no

    def ranking_prompt(self, ranking: Ranking) -> str:
        """The prompt: everything before the answer."""
        section = self.ranking
        return section.prompt.format(
            history=_lines(section.history_item, ranking.history),
            candidates=_lines(section.candidate_item, ranking.candidates),
        )

    def nothing_prompt(self) -> str:
        """A ranking's prompt without history and candidates."""
        return self.ranking.prompt.format(history="", candidates="")

    def ranking_answer(self, ranking: Ranking) -> str:
        """The first `answer_titles` titles, the relevant one first. Raises DataError without a target."""
        titles = ranking.best_first()
        return _lines(self.ranking.answer_item, titles[: self.answer_titles or len(titles)])

    def sample(self, ranking: Ranking, objective: Objective = "answer") -> Sample:
        """The labelled prompt as a sample, whose loss is the answer's or the choice's.

        Raises DataError without a target.
        """
        prompt = self.ranking_prompt(ranking)
        if objective == "answer":
            return Sample(prompt, self.ranking_answer(ranking))
        answer, *others = self.candidate_answers(replace(ranking, candidates=ranking.best_first()))
        return Sample(prompt, answer, tuple(others))

    def candidate_answers(self, ranking: Ranking) -> list[str]:
        """For each candidate, how an answer that names it first begins, up to the next title if any."""
        end = "" if self.answer_titles == 1 else "\n"
        return [self.ranking.answer_item.format(title=title) + end for title in ranking.candidates]

    def yes_no_prompt(self, record: YesNo) -> str:
        """The prompt: everything before Yes or No."""
        return self.yes_no.prompt.format(text=record.text)

    def fit(self, ranking: Ranking, encode: Callable[[str], Sequence[int]], max_tokens: int) -> Ranking:
        """The ranking with as many of the newest history titles as `max_tokens` of prompt allow.

        `encode` is `CausalLM.encode`. Raises DataError where the candidates alone are too long.
        """
        kept, dropped = 0, len(ranking.history)  # so many newest titles fit; so many do not, plus one
        if len(encode(self.ranking_prompt(ranking))) <= max_tokens:
            return ranking
        while kept < dropped - 1:
            middle = (kept + dropped) // 2
            shorter = replace(ranking, history=ranking.history[len(ranking.history) - middle :])
            if len(encode(self.ranking_prompt(shorter))) <= max_tokens:
                kept = middle
            else:
                dropped = middle
        fitted = replace(ranking, history=ranking.history[len(ranking.history) - kept :])
        tokens = len(encode(self.ranking_prompt(fitted)))
        if tokens > max_tokens:
            raise DataError(
                f"a prompt of {len(ranking.candidates)} candidates takes {tokens} tokens without history, "
                f"{max_tokens} are allowed",
                next_step="allow more tokens, or use fewer candidates or shorter titles",
            )
        return fitted


def template_names() -> list[str]:
    """The templates that are known by name."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _lines(item: str, titles: Sequence[str]) -> str:
    return "\n".join(item.format(title=title) for title in titles)


def _checked(prompt: str, places: set[str]) -> str:
    _check_places(prompt, places)
    if _TRAILING_SPACE.search(prompt):
        raise ValueError("a prompt may not end in a space: tokenizers would join it with the answer")
    return prompt


def _check_places(text: str, places: set[str]) -> None:
    try:
        found = {name for _, name, spec, conversion in Formatter().parse(text) if name is not None}
        plain = all(not spec and not conversion for _, _, spec, conversion in Formatter().parse(text))
    except ValueError:
        raise ValueError("a brace is open: write {{ and }} for braces themselves") from None
    if found != places or not plain:
        wanted = " and ".join(f"{{{name}}}" for name in sorted(places))
        raise ValueError(f"must contain {wanted} and no other place, each without format or conversion")
