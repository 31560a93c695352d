"""Pseudo-users: every item comes up, lengths are as drawn, nothing repeats, the seed decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.catalog import Catalog
from common.config import LearningSection, TextSection
from common.errors import DataError
from common.models.encoder import Encoder
from common.vectors import TaskVector
from server.learning.pseudo_users import draw, embed_histories, roll_out
from server.learning.teachers import DomainTexts, EmbeddingCache, encode, tokenize, with_vector


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 60), st.integers(1, 4), st.integers(0, 99))
def test_draws(first: int, second: int, count: int, length: int, seed: int) -> None:
    learning = LearningSection(history_length=length)
    draws = draw({"a": first, "b": second}, count, learning, seed)
    again = draw({"a": first, "b": second}, count, learning, seed)
    assert np.array_equal(draws.item_N, again.item_N)
    assert np.array_equal(draws.length_N, again.length_N)
    pairs = list(zip(draws.domain_N.tolist(), draws.item_N.tolist(), strict=True))
    for start in range(0, count, first + second):  # no item twice before all have been drawn
        epoch = pairs[start : start + first + second]
        assert len(set(epoch)) == len(epoch)
    sizes = np.array([first, second])[draws.domain_N]
    assert (draws.item_N < sizes).all()
    assert (draws.length_N >= 1).all()
    assert (draws.length_N <= np.minimum(length, sizes - 1)).all()


def test_another_seed_draws_otherwise() -> None:
    learning = LearningSection()
    first, second = (draw({"a": 50}, 50, learning, seed).item_N for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert sorted(first) == sorted(second) == list(range(50))


def test_a_catalog_of_one_item_is_refused_only_where_seen_items_are_masked() -> None:
    with pytest.raises(DataError, match="'tiny'"):
        draw({"tiny": 1, "big": 5}, 4, LearningSection(), 0)
    assert draw({"tiny": 1}, 4, LearningSection(mask_seen=False), 0).length_N.tolist() == [1] * 4


class Teacher:
    """The pico model plus one vector, and its catalog's embeddings."""

    def __init__(self, base: Path, tau: TaskVector, catalog: Catalog) -> None:
        self.encoder = Encoder.load(base)
        tensors = {name: param.detach() for name, param in self.encoder.model.named_parameters()}
        self.params = with_vector(tensors, tau)
        self.texts: DomainTexts = tokenize(self.encoder, catalog.domain, catalog, TextSection())
        self.items_IE = encode(self.encoder, self.texts.items, self.params)


@pytest.fixture(scope="module")
def teacher(base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog]) -> Teacher:
    return Teacher(base, taus["kitchen"], catalogs["kitchen"])


def rolled(teacher: Teacher, lengths: list[int], seed: int = 0, **options: float) -> list[tuple[int, ...]]:
    learning = LearningSection.model_validate({"history_length": 5, **options})
    starts = [i % len(teacher.texts) for i in range(len(lengths))]
    return roll_out(
        teacher.encoder, teacher.params, teacher.texts, teacher.items_IE, starts, lengths, learning, seed
    )


def test_rolled_out_histories(teacher: Teacher) -> None:
    lengths = [1, 5, 3, 2, 4, 1, 5, 11]
    histories = rolled(teacher, lengths)
    assert [len(history) for history in histories] == lengths
    assert all(len(set(history)) == len(history) for history in histories)
    assert [history[-1] for history in histories] == list(range(8))  # the first item is the oldest
    assert histories == rolled(teacher, lengths)
    assert histories != rolled(teacher, lengths, seed=1)


def test_a_rollout_of_the_best_one_follows_the_teacher(teacher: Teacher) -> None:
    """With k = 1 each next item is the teacher's best that is not in the history yet."""
    for history in rolled(teacher, [4] * 6, rollout_top_k=1):
        for length in range(1, 4):
            so_far = history[-length:]
            z_E = teacher.encoder.encode([teacher.texts.history(so_far)], 1, teacher.params)[0]
            scores_I = teacher.items_IE @ z_E
            scores_I[list(so_far)] = -torch.inf
            assert int(scores_I.argmax()) == history[-length - 1]


def test_without_masking_the_pseudo_label_is_the_item_itself(teacher: Teacher) -> None:
    """A one-item history and its item have the same text, so the same embedding and cosine 1."""
    histories = [(i,) for i in range(len(teacher.texts))]
    users_UE = embed_histories(teacher.encoder, teacher.params, teacher.texts, teacher.items_IE, histories)
    t_BI = users_UE @ teacher.items_IE.T
    assert t_BI.argmax(1).tolist() == list(range(len(teacher.texts)))
    t_BI.fill_diagonal_(-torch.inf)
    assert all(label != i for i, label in enumerate(t_BI.argmax(1).tolist()))


def test_embedding_of_histories_reuses_items_only_where_the_text_is_theirs(teacher: Teacher) -> None:
    histories = [(3,), (2, 5), (0, 1, 2)]
    users_UE = embed_histories(teacher.encoder, teacher.params, teacher.texts, teacher.items_IE, histories)
    expected = teacher.encoder.encode([teacher.texts.history(h) for h in histories], 8, teacher.params)
    torch.testing.assert_close(users_UE, expected, rtol=1e-4, atol=1e-5)


def test_cache_computes_once_and_survives_damage(tmp_path: Path) -> None:
    cache, calls = EmbeddingCache(tmp_path), []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"items": torch.ones(2, 3)}

    cpu = torch.device("cpu")
    for _ in range(2):
        assert torch.equal(cache.get({"a": 1}, compute, cpu)["items"], torch.ones(2, 3))
    assert len(calls) == 1
    cache.get({"a": 2}, compute, cpu)
    assert len(calls) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert torch.equal(cache.get({"a": 1}, compute, cpu)["items"], torch.ones(2, 3))
    assert len(calls) == 3
