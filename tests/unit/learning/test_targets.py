"""The teachers' target: own or ensemble, against naive float64; and that every teacher is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.catalog import Catalog
from common.config import LearningSection, TextSection
from common.vectors import TaskVector
from server.learning import learn
from server.learning.prepare import Inputs, load_inputs, pseudo_domains
from server.learning.teachers import Teacher, target_scores


def random_teacher(seed: int, items: int = 8, users: int = 5, width: int = 4) -> Teacher:
    generator = torch.Generator().manual_seed(seed)
    return Teacher(
        torch.randn(items, width, generator=generator), torch.randn(users, width, generator=generator)
    )


def naive(
    teachers: list[Teacher], users: list[int], items: list[int], seen: list[set[int]]
) -> list[list[float]]:
    """Standardise each teacher's row over what is not seen, average, bring to the first one's moments."""
    result = []
    for user, hidden in zip(users, seen, strict=True):
        rows, moments = [], []
        for teacher in teachers:
            row = [float(teacher.users_UE[user].double() @ teacher.items_IE[i].double()) for i in items]
            kept = [value for place, value in enumerate(row) if place not in hidden]
            mean = sum(kept) / len(kept)
            spread = (sum((value - mean) ** 2 for value in kept) / len(kept)) ** 0.5
            rows.append([(value - mean) / spread for value in row])
            moments.append((mean, spread))
        mean, spread = moments[0]
        result.append([mean + spread * sum(column) / len(rows) for column in zip(*rows, strict=True)])
    return result


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("items", [None, [0, 2, 3, 7]])
def test_ensemble_against_naive(masked: bool, items: list[int] | None) -> None:
    teachers = [random_teacher(seed) for seed in range(3)]
    columns = items or list(range(8))
    users, seen = [4, 0, 4], [{1}, {0, 3}, set[int]()]
    seen_BI = torch.zeros(3, len(columns), dtype=torch.bool)
    for row, hidden in zip(seen_BI, seen, strict=True):
        row[list(hidden)] = True
    got = target_scores(
        teachers, users, None if items is None else torch.tensor(items), seen_BI if masked else None
    )
    expected = naive(teachers, users, columns, seen if masked else [set()] * 3)
    visible = ~seen_BI if masked else torch.ones_like(seen_BI)
    torch.testing.assert_close(got[visible], torch.tensor(expected)[visible], rtol=1e-4, atol=1e-5)


def test_one_teacher_gives_its_cosines() -> None:
    teacher = random_teacher(0)
    got = target_scores([teacher], [1, 2], None, None)
    assert torch.equal(got, teacher.users_UE[[1, 2]] @ teacher.items_IE.T)


def test_an_ensemble_of_equals_is_the_teacher_whatever_their_scale() -> None:
    own = random_teacher(1)
    scaled = Teacher(own.items_IE * 3.0, own.users_UE)
    got = target_scores([own, scaled, own], [0, 3], None, None)
    torch.testing.assert_close(got, target_scores([own], [0, 3], None, None), rtol=1e-4, atol=1e-5)


def test_a_teacher_without_an_opinion_changes_no_order() -> None:
    own = random_teacher(2)
    silent = Teacher(torch.ones_like(own.items_IE), own.users_UE)
    got = target_scores([own, silent], [0], None, None)
    assert torch.isfinite(got).all()
    assert got.argsort().tolist() == target_scores([own], [0], None, None).argsort().tolist()


def section(**changes: object) -> LearningSection:
    values = {"steps": 3, "batch_size": 4, "precision": "fp32", "holdout": 0.2, "history_length": 2}
    return LearningSection.model_validate({**values, **changes})


def test_every_teacher_encodes_every_domain(
    base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], tmp_path: Path
) -> None:
    inputs: Inputs = load_inputs(base, taus, catalogs, section(), TextSection(), seed=0, pooling="auto")
    domains, _ = pseudo_domains(inputs, "ensemble", tmp_path)
    for domain in domains:
        name = domain.texts.name
        order = [name, *(other for other in inputs.domains if other != name)]
        assert len(domain.teachers) == 3
        for other, teacher in zip(order, domain.teachers, strict=True):
            params = inputs.model(other)
            items_IE = inputs.encoder.encode(domain.texts.items, 8, params)
            ids = [domain.texts.history(history) for history in domain.histories]
            torch.testing.assert_close(teacher.items_IE, items_IE, rtol=1e-4, atol=1e-5)
            users_UE = inputs.encoder.encode(ids, 8, params)
            torch.testing.assert_close(teacher.users_UE, users_UE, rtol=1e-4, atol=1e-5)
    own, _ = pseudo_domains(inputs, "own", tmp_path)
    assert [len(domain.teachers) for domain in own] == [1, 1, 1]
    assert [domain.histories for domain in own] == [domain.histories for domain in domains]


@pytest.mark.parametrize("objective", ["mergerec", "ranking-distillation"])
def test_the_target_matters(
    base: Path, taus: dict[str, TaskVector], catalogs: dict[str, Catalog], tmp_path: Path, objective: str
) -> None:
    results = [
        learn(
            base,
            taus,
            catalogs,
            objective=objective,
            granularity="domain",
            learning=section(target=target, holdout=0.0),
            text=TextSection(),
            work=tmp_path / target,
        ).coefficients
        for target in ("own", "ensemble")
    ]
    assert results[0] != results[1]
