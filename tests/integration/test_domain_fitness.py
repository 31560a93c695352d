"""Evo-Merging by what two domains answer: numbers go in, one whole number a candidate comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clients.fitness import Answers, UserSamples
from clients.privacy import AnswerLimits
from common.config import LoraSection
from common.errors import PolicyError
from common.language.adapters import adapter_tensors, initial_adapter
from common.language.model import load_causal
from common.language.pool import Candidate, Pool
from common.language.samples import Sample
from server.evolution.evolve import evolve
from server.evolution.fitness import DomainFitness
from server.evolution.options import EvolutionOptions
from server.evolution.tuning import Tuning, tune_lora
from tests.unit.language.conftest import build_causal

LORA = LoraSection(rank=4, alpha=8.0, dropout=0.0, modules=("q_proj", "v_proj", "up_proj"))
PRIVATE: dict[str, list[Sample]] = {
    "tea": [Sample("tea\n", "cup"), Sample("tea pot\n", "lamp"), Sample("oak\n", "table")],
    "toys": [Sample("boat\n", "train"), Sample("car\n", "bike"), Sample("duck\n", "drum")],
}
OPTIONS = EvolutionOptions(
    ratio_iterations=2, scale_iterations=8, population=6, ratio_penalty=0.01, scale_penalty=0.01, sigma=0.2
)


class Border:
    """What crosses between the server and the domains' answers: JSON texts, kept."""

    def __init__(self, answers: dict[str, Answers]) -> None:
        self.answers, self.sent, self.returned = answers, [], []

    def ask_all(self, candidates: list[Candidate]) -> dict[str, list[float]]:
        return {domain: self.ask(domain, candidates) for domain in sorted(PRIVATE)}

    def ask(self, domain: str, candidates: list[Candidate]) -> list[float]:
        found = []
        for candidate in candidates:
            self.sent.append(json.dumps([*candidate.ratios, *candidate.scales]))
            numbers = json.loads(self.sent[-1])
            half = len(numbers) // 2
            self.returned.append(
                json.dumps(self.answers[domain](Candidate.of(numbers[:half], numbers[half:])))
            )
            found.append(json.loads(self.returned[-1]) / 1000)
        return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_causal(tmp_path_factory.mktemp("causal") / "base")


@pytest.fixture(scope="module")
def pool(base: Path) -> Pool:
    """Each domain's own adapter, and one that is noise."""
    lm, table = load_causal(base, precision="fp32"), adapter_tensors(base, LORA)
    made = {
        domain: tune_lora(lm, LORA, initial_adapter(table, 0), samples, Tuning(epochs=12, batch_size=3))[0]
        for domain, samples in PRIVATE.items()
    }
    generator = torch.Generator().manual_seed(0)
    noise = {name: x.std() * torch.randn(x.shape, generator=generator) for name, x in made["tea"].items()}
    return Pool({**made, "noise": noise})


def border(base: Path, pool: Pool, folder: Path, **limits: int) -> Border:
    answers = {}
    for domain, samples in PRIVATE.items():
        users = [UserSamples(f"{domain}-{n}", (sample,)) for n, sample in enumerate(samples)]
        lm = load_causal(base, precision="fp32")
        allowed = AnswerLimits(**{"min_users": 3, **limits})
        answers[domain] = Answers(lm, LORA, pool, users, allowed, folder / domain)
    return Border(answers)


def merge(crossings: Border, pool: Pool, work: Path) -> Candidate:
    return evolve(pool, DomainFitness(crossings.ask_all, {"run": "r"}), OPTIONS, work).candidate


def test_the_domains_find_a_merge_that_serves_both(base: Path, pool: Pool, tmp_path: Path) -> None:
    crossings = border(base, pool, tmp_path / "answers")
    found = merge(crossings, pool, tmp_path / "work")
    n = len(pool)

    evaluations = OPTIONS.evaluations(n)
    assert len(crossings.sent) == len(crossings.returned) == evaluations * len(PRIVATE)
    assert all(len(json.loads(text)) == 2 * n for text in crossings.sent)
    assert all(text.isdecimal() for text in crossings.returned)  # one whole number, and nothing else

    def loss(candidate: Candidate) -> float:
        return sum(crossings.ask(domain, [candidate])[0] for domain in PRIVATE) / len(PRIVATE)

    nothing, even = Candidate.of([1.0] * n, [0.0] * n), Candidate.of([1.0] * n, [1 / n] * n)
    assert loss(found) < min(loss(nothing), loss(even)) - 0.1
    scales = dict(zip(pool.labels, found.scales, strict=True))
    assert abs(scales["noise"]) < max(abs(scales["tea"]), abs(scales["toys"]))

    again = border(base, pool, tmp_path / "answers")
    left = [answer.left for answer in again.answers.values()]
    assert merge(again, pool, tmp_path / "other") == found  # another search on the same answers
    assert [answer.left for answer in again.answers.values()] == left


def test_a_spent_budget_ends_the_search_and_a_larger_one_lets_it_go_on(
    base: Path, pool: Pool, tmp_path: Path
) -> None:
    small = border(base, pool, tmp_path / "answers", max_answers=10)
    with pytest.raises(PolicyError, match="10 candidates were answered"):
        merge(small, pool, tmp_path / "work")
    assert len(small.returned) == 10 + 7  # all of tea's, and toys' whole generations
    large = border(base, pool, tmp_path / "answers")
    whole = border(base, pool, tmp_path / "whole")
    assert merge(large, pool, tmp_path / "work") == merge(whole, pool, tmp_path / "at-once")
