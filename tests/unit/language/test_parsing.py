"""Reading generated answers: what real models do to titles, by example and by property."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.language.parsing import parse_answer
from common.language.records import title_key

TITLES = ("Green tea, 20 bags", "Oak table", "Oak table lamp", "2 Cups", "A+ Soap", "Die Hard (1988)", "7")


@pytest.mark.parametrize(
    ("text", "order", "made_up", "repeated"),
    [
        ("Oak table\n2 Cups", (1, 3), 0, 0),
        ("1. Oak table\n2. 2 Cups\n3) 7", (1, 3, 6), 0, 0),
        ("1: 'oak  TABLE.'\n- \"Oak table lamp\"", (1, 2), 0, 0),
        ("2 Cups", (3,), 0, 0),
        ("7", (6,), 0, 0),
        ("**Die Hard (1988)**\n* die hard 1988", (5,), 0, 1),
        ("[1] Die Hard\n(2) A+ soap", (5, 4), 0, 0),
        ("Green tea, 20", (0,), 0, 0),
        ("Gren tea, 20 bag", (0,), 0, 0),
        ("Oak tab", (), 1, 0),
        ("Oak table, Green tea, 20 bags, 2 Cups", (1, 0, 3), 0, 0),
        ("The best is Oak table lamp, then Oak table.", (2, 1), 0, 0),
        ("A golden spoon\n\nOak table\n...\nOak table", (1,), 1, 1),
        ("", (), 0, 0),
        ("\n - \n1.\n", (), 0, 0),
        ("Oak table lam", (2,), 0, 0),
        ("Green tea, 2...", (0,), 0, 0),
        ("1 golden spoon and 7 others", (), 1, 0),
        ("7.", (6,), 0, 0),
        ("I cannot tell.", (), 1, 0),
    ],
)
def test_examples(text: str, order: tuple[int, ...], made_up: int, repeated: int) -> None:
    parsed = parse_answer(text, TITLES)
    assert (parsed.order, parsed.made_up, parsed.repeated) == (order, made_up, repeated)
    assert parsed.valid == bool(order)


def test_what_is_not_named_is_last() -> None:
    parsed = parse_answer("7\nOak table", TITLES)
    assert [parsed.rank(position, 7) for position in (6, 1, 0)] == [1, 2, 7]


def test_titles_that_differ_in_signs_alone() -> None:
    titles = ("C", "C+", "C++", "???")
    assert parse_answer("C++\nC\n???\nc+", titles).order == (2, 0, 3, 1)


words = st.sampled_from("red green tea oak cup 2 20 die hard soap for ball é ß İ x".split())  # noqa: SIM905
signs = st.sampled_from(["", "", "!", " (1999)", ", pack of 3", "®", " - blue"])
titles_lists = st.lists(
    st.builds(lambda own, sign: " ".join(own) + sign, st.lists(words, min_size=1, max_size=5), signs),
    min_size=2,
    max_size=12,
    unique_by=title_key,
)
marks = st.sampled_from(
    [lambda n: "", lambda n: f"{n}. ", lambda n: f"{n}) ", lambda n: f"({n}) ", lambda n: "- ",
     lambda n: "* ", lambda n: "\u2022 ", lambda n: f"[{n}] ", lambda n: f"  {n}: "]
)  # fmt: skip
quotes = st.sampled_from(["{}", '"{}"', "\u201c{}\u201d", "'{}'", "**{}**", " {}  "])


@settings(max_examples=60, deadline=None)
@given(titles=titles_lists, data=st.data())
def test_whole_titles_are_found_however_they_are_dressed(titles: list[str], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(titles))))
    mark, quote = data.draw(marks), data.draw(quotes)
    lines = [mark(n) + quote.format(titles[position]) for n, position in enumerate(order, start=1)]
    parsed = parse_answer("\n".join(lines), titles)
    assert parsed.order == tuple(order)
    assert parsed.made_up == parsed.repeated == 0


@settings(max_examples=60, deadline=None)
@given(titles=titles_lists, text=st.text(max_size=200))
def test_anything_can_be_read(titles: list[str], text: str) -> None:
    parsed = parse_answer(text, titles)
    assert len(set(parsed.order)) == len(parsed.order)
    assert all(0 <= position < len(titles) for position in parsed.order)
    lines = [line for line in text.splitlines() if line.strip()]
    assert parsed.made_up <= len(lines)


@settings(max_examples=60, deadline=None)
@given(titles=titles_lists, data=st.data())
def test_one_title_in_other_case_and_space(titles: list[str], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(titles) - 1))
    shown = "   ".join(titles[position].lower().split())
    assert parse_answer(shown, titles).order == (position,)
