"""The tokenizer of a vocabulary-and-score list, against the plain algorithm, and on the real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ModelError
from common.language.model import load_causal
from common.language.scoring import generate
from common.language.vocabulary import find_vocabulary, load_vocabulary

REAL = Path(__file__).parents[3] / "../shared/data/lm/stories260K"
PIECES = [" ", "a", "b", "n", "d", "\u00e9", " a", "an", "nd", " an", "and", "ab", " and", "ba", " b"]


def write_list(folder: Path) -> Path:
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{code:02X}>" for code in range(256)), *PIECES]
    tokens = [token.encode().decode("latin-1") for token in tokens]
    scores = [0.0] * 259 + [-100.0] * 6 + [-float(n) for n in range(len(PIECES) - 6)]
    path = folder / "tiny_vocab.json"
    path.write_text(json.dumps({"tokens": tokens, "scores": scores}))
    return path


def plain_bpe(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """Characters or their bytes, then the best-scoring join, leftmost first, until there is none."""
    known = {piece: index for index, piece in enumerate(pieces)}
    ids: list[int] = []
    for character in " " + text:
        codes = [code + 3 for code in character.encode()]
        ids += [known[character]] if character in known else codes
    while True:
        joins = [
            (scores[known[joined]], -n, known[joined])
            for n in range(len(ids) - 1)
            if min(ids[n], ids[n + 1]) >= 259 and (joined := pieces[ids[n]] + pieces[ids[n + 1]]) in known
        ]
        if not joins:
            return ids
        _, place, token = max(joins)
        ids[-place : -place + 2] = [token]


@pytest.fixture(scope="module")
def tiny_list(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str], list[float]]:
    path = write_list(tmp_path_factory.mktemp("vocabulary"))
    scores = json.loads(path.read_text())["scores"]
    return load_vocabulary(path), ["<unk>", "<s>", "</s>", *[""] * 256, *PIECES], scores


@settings(max_examples=60, deadline=None)
@given(text=st.text("abnd \u00e9z\u2713", min_size=1, max_size=30))
def test_it_is_the_plain_algorithm(tiny_list: tuple[Any, list[str], list[float]], text: str) -> None:
    tokenizer, pieces, scores = tiny_list
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, *plain_bpe(text, pieces, scores)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_wrong_lists_are_named(tmp_path: Path) -> None:
    path = write_list(tmp_path)
    assert find_vocabulary(tmp_path) == path
    good = json.loads(path.read_text())
    for bad, words in (
        ({**good, "scores": good["scores"][1:]}, "differ in number"),
        ({**good, "tokens": [*good["tokens"][:-1], "a"]}, "occurs twice"),
        ({**good, "tokens": [*good["tokens"][:-1], 7]}, "'tokens' is no list of its kind"),
        ({**good, "scores": "high"}, "'scores' is no list of its kind"),
        ({name: values[:100] for name, values in good.items()}, "byte token <0x61> is missing"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ModelError, match=words):
            load_vocabulary(path)
    path.write_text(json.dumps({"tokens": []}))
    assert find_vocabulary(tmp_path) is None


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/lm/stories260K is not there")
def test_the_real_model_tells_a_story() -> None:
    lm = load_causal(REAL, precision="fp32")
    begin = "Once upon a time, there was a little girl named"
    ids = lm.encode(begin)
    assert ids[:5] == [1, 403, 407, 261, 378]
    assert lm.decode(ids) == begin
    (story,) = generate(lm, [begin], 60)
    assert story.startswith("Lily. She loved to play outside in the park.")
    words = {word.strip('.,!"').lower() for word in story.split()}
    assert words >= {"she", "the", "to"}
