"""Real models of two layers: a good adapter among bad ones, whatever says how good it is; and the table."""

import json
import math

import pytest
import torch

from common.config import LoraSection
from common.errors import ConfigError, DataError
from common.language.adapters import adapter_tensors, initial_adapter, load_adapter
from common.language.model import load_causal
from common.language.pool import Candidate, Pool
from common.language.prompts import Template
from common.language.records import Ranking
from common.language.samples import Sample
from common.language.scoring import answer_losses, first_token_entropies, whole_log_likelihoods
from common.models.base import model_digest
from server.evolution.compare import METHODS, compare
from server.evolution.evolve import evolve
from server.evolution.fitness import AgreementFitness, DomainFitness, EntropyFitness, ScoringFitness
from server.evolution.options import EvolutionOptions
from server.evolution.tuning import Tuning, tune_lora
from server.evolution.workers import ScoringWorkers
from tests.unit.language.conftest import build_causal

LORA = LoraSection(rank=4, alpha=8.0, dropout=0.0, modules=("q_proj", "v_proj", "up_proj"))
SAMPLES = [
    Sample("tea\n", "cup"),
    Sample("tea pot\n", "lamp"),
    Sample("boat\n", "train"),
    Sample("oak\n", "table"),
    Sample("car\n", "bike"),
]
CHOICES = [sample._replace(others=("duck", "drum and box")) for sample in SAMPLES]
QUICK = EvolutionOptions(
    ratio_iterations=3, scale_iterations=12, population=8, ratio_penalty=0.01, scale_penalty=0.01, sigma=0.15
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_causal(tmp_path_factory.mktemp("causal") / "base")


@pytest.fixture(scope="module")
def lm(base):
    return load_causal(base, precision="fp32")


@pytest.fixture(scope="module")
def adapters(base, lm):
    """`good` was tuned on the samples; two others are noise of its size."""
    table = adapter_tensors(base, LORA)
    good, _ = tune_lora(lm, LORA, initial_adapter(table, 0), SAMPLES, Tuning(epochs=15, batch_size=4))
    generator = torch.Generator().manual_seed(1)
    bad = {
        label: {name: x.std() * torch.randn(x.shape, generator=generator) for name, x in good.items()}
        for label in ("bad", "worse")
    }
    return {"good": good, **bad}


@pytest.fixture(scope="module")
def pool(adapters):
    return Pool(adapters)


@pytest.fixture
def scoring(lm, base, pool):
    return ScoringFitness(lm, LORA, pool, model_digest(base), SAMPLES, batch_size=2)


def alone(label, pool):
    return Candidate.of([1.0] * len(pool), [float(label == other) for other in pool.labels])


def test_scoring_is_the_mean_loss_of_the_answers(scoring, lm, pool, adapters):
    (found,) = scoring.losses([alone("good", pool)])
    lm.set_adapter(adapters["good"])
    with torch.no_grad():
        expected = torch.cat([answer_losses(lm, [sample[:2]]) for sample in SAMPLES]).double().mean()
    assert found == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("end", ["", "\n"])  # after a line break more titles come, and no end of the text
def test_choices_are_scored_by_the_probability_of_the_answer_among_them(
    scoring, lm, base, pool, adapters, end
):
    choices = [Sample(p, answer + end, tuple(one + end for one in others)) for p, answer, others in CHOICES]
    fitness = ScoringFitness(lm, LORA, pool, model_digest(base), choices, batch_size=2)
    (found,) = fitness.losses([alone("good", pool)])
    lm.set_adapter(adapters["good"])
    losses = []
    for prompt, answer, others in choices:
        likelihoods = []
        for ids in lm.encode_answers(prompt, [answer, *others], end=not end):
            assert (ids[-1] in lm.eos_ids) == (not end)
            with torch.no_grad():
                mean = whole_log_likelihoods(lm, [lm.encode(prompt)], [ids])
            likelihoods.append(float(mean) * len(ids))
        losses.append(-float(torch.tensor(likelihoods).log_softmax(0)[0]))
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert fitness.key != scoring.key


def test_a_choice_can_be_tuned_by_gradients(lm, base):
    start = initial_adapter(adapter_tensors(base, LORA), 0)
    _, facts = tune_lora(lm, LORA, start, CHOICES * 2, Tuning(epochs=4, batch_size=4))
    assert facts["held_back_loss"]["tuned"] < facts["held_back_loss"]["untuned"] - 0.1


def test_a_good_adapter_among_bad_ones_wins(scoring, pool, tmp_path):
    even, good = scoring.losses([Candidate.of([1.0] * 3, [1 / 3] * 3), alone("good", pool)])
    (base,) = scoring.losses([Candidate.of([0.0] * 3, [0.0] * 3)])
    assert good < base - 0.5  # else the test would prove nothing
    found = evolve(pool, scoring, QUICK, tmp_path, seed=0)
    scales = dict(zip(pool.labels, found.candidate.scales, strict=True))
    assert abs(scales["good"]) > 2 * max(abs(scales["bad"]), abs(scales["worse"]))
    assert scoring.of(found.adapter) < min(even, base) - 0.3


@pytest.mark.slow
def test_workers_score_as_one_process_does(scoring, lm, base, pool):
    candidates = [Candidate.of([1.0, 0.5, 0.2], [1.0, x, -x]) for x in (0.1, 0.3, 0.6)]
    with ScoringWorkers(base, LORA, SAMPLES, 2, batch_size=2) as workers:
        fitness = ScoringFitness(lm, LORA, pool, model_digest(base), SAMPLES, 2, workers)
        assert fitness.losses(candidates) == pytest.approx(scoring.losses(candidates), abs=1e-5)
        assert fitness.key == scoring.key


def test_agreement_is_zero_for_the_teacher_and_small_for_what_is_like_it(lm, base, pool):
    rankings = {"good": [Ranking("", ("tea",), ("red cup", "lamp", "small oak table"), None)] * 2}
    template = Template.load("ranking")
    fitness = AgreementFitness(lm, LORA, pool, model_digest(base), template, rankings, temperature=0.5)
    own, bad = fitness.losses([alone("good", pool), alone("bad", pool)])
    assert own == pytest.approx(0, abs=1e-6)
    assert bad > 1e-3


def test_entropy_is_that_of_the_first_answer_tokens(lm, base, pool, adapters):
    prompts = [sample.prompt for sample in SAMPLES]
    fitness = EntropyFitness(lm, LORA, pool, model_digest(base), prompts, tokens=2)
    (found,) = fitness.losses([alone("bad", pool)])
    lm.set_adapter(adapters["bad"])
    with torch.no_grad():
        assert found == pytest.approx(float(first_token_entropies(lm, prompts, 2).mean()), abs=1e-5)


def test_domains_are_asked_for_numbers_and_give_one_each():
    asked = []

    def ask(candidates):
        asked.append(list(candidates))
        return {domain: [loss] * len(candidates) for domain, loss in (("tea", 1.0), ("toys", 2.0))}

    fitness = DomainFitness(ask, {"run": "r"})
    candidates = [Candidate.of([1], [0.5]), Candidate.of([0], [1])]
    assert fitness.losses(candidates) == [1.5, 1.5]
    assert asked == [candidates]
    silent = DomainFitness(lambda _: {"tea": [1.0, math.nan], "toys": [1.0, 1.0]}, {})
    assert silent.losses(candidates)[0] == 1.0
    assert math.isnan(silent.losses(candidates)[1])
    with pytest.raises(DataError, match="domain tea answered 1 of 2"):
        DomainFitness(lambda _: {"tea": [1.0]}, {}).losses(candidates)
    with pytest.raises(DataError, match="no domain"):
        DomainFitness(lambda _: {}, {}).losses(candidates)


@pytest.mark.parametrize("source", [ScoringFitness, EntropyFitness])
def test_nothing_to_score_on_is_refused(source, lm, base, pool):
    with pytest.raises(DataError):
        source(lm, LORA, pool, model_digest(base), [])


def test_the_table_has_every_method_and_goes_on_where_it_stopped(base, adapters, scoring, tmp_path):
    class Stop(BaseException):
        pass

    measured = []

    def measure(model):
        measured.append(model)
        if len(measured) == 12:
            raise Stop
        return {"first": float(answer_losses(model, [SAMPLES[0][:2]]).detach().mean())}

    def table():
        return compare(
            base, LORA, adapters, SAMPLES, tmp_path, options=QUICK, measure=measure, domain="good",
            tuning=Tuning(epochs=2, batch_size=4),
        )  # fmt: skip

    with pytest.raises(Stop):
        table()
    rows = {row.method: row for row in table()}
    assert len(measured) == len(METHODS) + 1  # eleven rows were kept
    assert tuple(rows) == METHODS
    assert rows["best-adapter"].facts["adapter"] == "good"
    assert rows["lorahub"].evaluations == 40
    assert rows["evo-merging"].evaluations == QUICK.evaluations(3) == 1 + 24 + 1 + 96
    assert rows["scales-only"].evaluations <= rows["evo-merging"].evaluations
    assert rows["evo-merging"].loss < rows["base"].loss
    for method, row in rows.items():
        assert math.isfinite(row.loss), method
        assert set(row.measures) == {"first"}
        if method != "ia3":
            lora, adapter = load_adapter(tmp_path / method / "adapter")
            assert (lora.rank, lora.alpha) == (LORA.rank, LORA.alpha)
            assert scoring.of(adapter) == pytest.approx(row.loss, abs=1e-5)
    assert json.loads((tmp_path / "base" / "row.json").read_text())["method"] == "base"


def test_losses_of_another_adapter_of_that_name_are_not_replayed(base, adapters, tmp_path):
    def scales(adapters, folder):
        (row,) = compare(base, LORA, adapters, SAMPLES, folder, methods=["lorahub"], options=QUICK)
        return row.facts["scales"]

    renamed = {**adapters, "good": adapters["bad"], "bad": adapters["good"]}
    assert scales(adapters, tmp_path / "a") != scales(renamed, tmp_path / "b")
    assert scales(renamed, tmp_path / "a") == scales(renamed, tmp_path / "b")


def test_an_unknown_method_or_domain_is_refused_by_name(base, adapters, tmp_path):
    with pytest.raises(ConfigError, match="tiess"):
        compare(base, LORA, adapters, SAMPLES, tmp_path, methods=["tiess"])
    with pytest.raises(ConfigError, match="coffee"):
        compare(base, LORA, adapters, SAMPLES, tmp_path, domain="coffee")
