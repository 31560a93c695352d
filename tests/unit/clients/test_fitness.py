"""A domain's answers about candidates: one number, a budget, noise with its price."""

import json
import math

import pytest
import torch

from clients.fitness import Answers, UserSamples
from clients.privacy import AnswerLimits, privacy_of
from common.config import LoraSection
from common.errors import DataError, PolicyError
from common.language.adapters import adapter_tensors
from common.language.pool import Candidate, Pool
from common.language.samples import Sample
from common.language.scoring import answer_losses
from tests.unit.language.conftest import build_causal

LORA = LoraSection(rank=2, alpha=4.0, dropout=0.0, modules=("q_proj", "v_proj"))
ONE = Candidate.of([1.0, 0.5], [0.6, -0.4])
TWO = Candidate.of([1.0, 0.5], [0.1, 0.4])


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    from common.language.model import load_causal

    return load_causal(build_causal(tmp_path_factory.mktemp("causal") / "base"), precision="fp32")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_causal(tmp_path_factory.mktemp("causal") / "base")


@pytest.fixture(scope="module")
def pool(base):
    generator = torch.Generator().manual_seed(0)
    table = adapter_tensors(base, LORA)
    return Pool(
        {
            label: {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in table.items()}
            for label in ("tea", "toys")
        }
    )


USERS = [
    UserSamples("u1", (Sample("tea\n", "cup"), Sample("tea pot\n", "lamp and table"))),
    UserSamples("u2", (Sample("boat\n", "train"),)),
    UserSamples("u3", (Sample("oak\n", "table"), Sample("car\n", "bike"))),
]


def answers(lm, pool, folder, users=USERS, normal=None, **limits):
    limits = {"min_users": 3, **limits}
    return Answers(lm, LORA, pool, users, AnswerLimits(**limits), folder, normal=normal)


def expected(lm, pool, candidate, clip=10.0):
    """Mean over users of the mean over each user's samples, in float64, from the plain scoring."""
    lm.set_adapter(pool.mix([candidate])[0])
    total = 0.0
    for user in USERS:
        with torch.no_grad():
            losses_N = answer_losses(lm, [sample[:2] for sample in user.samples])
            total += min(float(losses_N.double().mean()), clip)
    return total / len(USERS)


def test_an_answer_is_the_mean_over_users_in_thousandths(lm, pool, tmp_path):
    ask = answers(lm, pool, tmp_path)
    for candidate in (ONE, TWO):
        found = ask(candidate)
        assert type(found) is int
        assert abs(found / 1000 - expected(lm, pool, candidate)) <= 0.0006
    assert ask(ONE) != ask(TWO)


def test_a_users_loss_is_cut_and_what_is_not_finite_counts_as_the_cut(lm, pool, tmp_path):
    assert answers(lm, pool, tmp_path / "low", clip=0.001)(ONE) == 1
    huge = Candidate.of([1.0, 1.0], [1e30, 1e30])
    assert answers(lm, pool, tmp_path / "huge", clip=7.0)(huge) == 7000


def test_no_more_than_the_budget_is_answered_and_asking_again_is_free(lm, pool, tmp_path):
    ask = answers(lm, pool, tmp_path, max_answers=2)
    first = [ask(ONE), ask(TWO)]
    assert ask.left == 0
    assert [ask(ONE), ask(TWO)] == first
    with pytest.raises(PolicyError, match="2 candidates were answered"):
        ask(Candidate.of([1, 1], [0, 0]))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_the_budget_and_the_answers_outlive_a_kill(lm, pool, tmp_path):
    drawn = iter([1.0, 2.0, 3.0])
    ask = answers(lm, pool, tmp_path, max_answers=2, noise_multiplier=1.0, normal=lambda: next(drawn))
    given = ask(ONE)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"step": 2, "candi')
    again = answers(lm, pool, tmp_path, max_answers=2, noise_multiplier=1.0, normal=lambda: next(drawn))
    assert again(ONE) == given  # the same noise: asking again averages nothing out
    assert again.left == 1
    again(TWO)
    third = answers(lm, pool, tmp_path, max_answers=2, noise_multiplier=1.0, normal=lambda: next(drawn))
    assert (third.left, third(ONE)) == (0, given)


def test_the_file_of_answers_holds_digests_and_numbers_only(lm, pool, tmp_path):
    answers(lm, pool, tmp_path)(ONE)
    (line,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert sorted(line) == ["candidate", "loss_e3", "step"]
    assert all(character in "0123456789abcdef" for character in line["candidate"])


def test_noise_is_what_one_user_can_change_times_the_multiplier(lm, pool, tmp_path):
    quiet = answers(lm, pool, tmp_path / "q")(ONE)
    for drawn in (-2.0, 0.5):
        noisy = answers(lm, pool, tmp_path / f"{drawn}", noise_multiplier=0.3, normal=lambda z=drawn: z)(ONE)
        assert noisy - quiet == pytest.approx(1000 * 0.3 * 10.0 / 3 * drawn, abs=1.1)


def test_an_answer_stays_in_its_range_whatever_the_noise(lm, pool, tmp_path):
    for drawn, bound in ((-1e9, 0), (1e9, 10_000)):
        folder = tmp_path / f"{bound}"
        assert answers(lm, pool, folder, noise_multiplier=1.0, normal=lambda z=drawn: z)(ONE) == bound


def test_the_whole_budget_is_accounted_for():
    assert privacy_of(AnswerLimits()).mechanism == "none"
    limits = AnswerLimits(max_answers=400, noise_multiplier=40.0, delta=1e-5)
    facts = privacy_of(limits)
    single = privacy_of(AnswerLimits(max_answers=1, noise_multiplier=2.0, delta=1e-5))
    assert facts.mechanism == "gaussian"
    assert facts.epsilon_e6 == pytest.approx(single.epsilon_e6, rel=1e-6)  # 400 at z = 40 are one at z = 2
    exact = next(e / 1000 for e in range(100_000) if gaussian_delta(e / 1000, 2.0) <= 1e-5)
    assert exact <= facts.epsilon_e6 / 1e6 <= 1.1 * exact


def gaussian_delta(epsilon, z):
    """Exact delta of one Gaussian mechanism (Balle and Wang, 2018, theorem 8)."""

    def below(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return below(0.5 / z - epsilon * z) - math.exp(epsilon) * below(-0.5 / z - epsilon * z)


def test_too_few_users_or_users_without_samples_answer_nothing(lm, pool, tmp_path):
    with pytest.raises(PolicyError, match="3 validation users, fewer than the 4"):
        answers(lm, pool, tmp_path, min_users=4)
    with pytest.raises(DataError, match="no samples"):
        answers(lm, pool, tmp_path, users=[*USERS, UserSamples("u4", ())])


def test_choices_cost_answers_of_their_own(lm, pool, tmp_path):
    whole = answers(lm, pool, tmp_path)
    first = whole(ONE)
    choices = [
        UserSamples(user.user, tuple(sample._replace(others=("duck", "oak")) for sample in user.samples))
        for user in USERS
    ]
    asked = answers(lm, pool, tmp_path, users=choices)
    assert asked.left == whole.left
    chosen = asked(ONE)
    assert asked.left == whole.left - 1
    assert chosen != first
    assert answers(lm, pool, tmp_path)(ONE) == first
