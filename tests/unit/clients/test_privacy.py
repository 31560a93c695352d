"""The gate and the privacy facts: they are the trainer's, within the owner's limits, and they add up."""

from pathlib import Path

import pytest
from crossing import Owner, Shore, make_vector

from clients.policy import EgressPolicy
from clients.privacy import CLAIM, PrivacyLimits, Spent, spent, write_claim
from common.config import RunConfig, load_toml
from common.errors import ConfigError, GateError
from common.parcels import Privacy

FACTS = Privacy(
    mechanism="dp-sgd", clip_e6=1_000_000, noise_e6=800_000, epsilon_e6=3_000_000, delta_e12=10_000_000
)


@pytest.fixture
def toys(tmp_path: Path) -> Owner:
    return Owner(tmp_path / "toys", Shore(tmp_path / "server"))


def vector(folder: Path, seed: int, facts: Privacy | None = FACTS) -> Path:
    folder.mkdir()
    path = make_vector(folder / "vector.safetensors", seed)
    if facts is not None:
        write_claim(path, facts)
    return path


def release(owner: Owner, path: Path, privacy: Privacy) -> Privacy:
    return owner.gate.release(owner.draft(path, privacy=privacy), path).header.privacy


def demand(owner: Owner, **limits: float) -> None:
    owner.gate.policy = EgressPolicy(privacy=PrivacyLimits(**limits))


def test_the_header_says_what_the_trainer_wrote(toys: Owner, tmp_path: Path) -> None:
    path = vector(tmp_path / "a", 0)
    assert release(toys, path, FACTS) == FACTS
    for claimed in (Privacy(), FACTS.model_copy(update={"epsilon_e6": 2_999_999})):
        with pytest.raises(GateError, match="not those that the trainer wrote"):
            release(toys, vector(tmp_path / f"b{claimed.epsilon_e6}", 1), claimed)
    with pytest.raises(GateError, match="not those that the trainer wrote"):
        release(toys, vector(tmp_path / "c", 2, None), FACTS)
    moved = vector(tmp_path / "d", 3, None)
    moved.with_name(CLAIM).write_bytes(path.with_name(CLAIM).read_bytes())
    with pytest.raises(GateError, match="another vector"):
        release(toys, moved, FACTS)
    moved.with_name(CLAIM).write_text("{}")
    with pytest.raises(GateError, match="unreadable"):
        release(toys, moved, FACTS)


def test_what_left_adds_up_and_the_same_vector_counts_once(toys: Owner, tmp_path: Path) -> None:
    assert spent(toys.journal) == Spent() and str(Spent()) == "no task vector has left"
    first = vector(tmp_path / "a", 0)
    release(toys, first, FACTS)
    release(toys, first, FACTS)
    release(toys, vector(tmp_path / "b", 1), FACTS)
    release(toys, vector(tmp_path / "c", 2, None), Privacy())
    toys.restart()
    assert spent(toys.journal) == Spent(3, 1, 6.0, 2e-5)
    assert str(spent(toys.journal)) == (
        "epsilon 6, delta 2e-05 by 2 of 3 task vectors; 1 left without differential privacy"
    )


def test_limits_hold_for_one_vector_and_for_all(toys: Owner, tmp_path: Path) -> None:
    demand(toys, max_epsilon=2.5)
    with pytest.raises(GateError, match="max_epsilon"):
        release(toys, vector(tmp_path / "a", 0), FACTS)
    with pytest.raises(GateError, match="demands"):
        release(toys, vector(tmp_path / "b", 1, None), Privacy())
    demand(toys, max_epsilon=3.0, max_delta=1e-6)
    with pytest.raises(GateError, match="max_delta"):
        release(toys, vector(tmp_path / "c", 2), FACTS)
    demand(toys, max_total_epsilon=4.0)
    path = vector(tmp_path / "d", 3)
    release(toys, path, FACTS)
    release(toys, path, FACTS)  # nothing new is told
    with pytest.raises(GateError, match="max_total_epsilon"):
        release(toys, vector(tmp_path / "e", 4), FACTS)


def test_a_run_without_the_demanded_privacy_is_refused() -> None:
    private = RunConfig.model_validate({"privacy": {"mechanism": "dp-sgd", "epsilon": 3}})
    PrivacyLimits().check_run(RunConfig())
    PrivacyLimits(max_epsilon=8.0).check_run(private)
    with pytest.raises(GateError, match="demands"):
        PrivacyLimits(max_epsilon=8.0).check_run(RunConfig())


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("epsilon = 3", "does nothing"),
        ("mechanism = 'dp-sgd'", "either epsilon or noise"),
        ("mechanism = 'dp-sgd'\nepsilon = 3\nnoise_multiplier = 1.0", "either epsilon or noise"),
        ("mechanism = 'dp-sgd'\nepsilon = 3\n[training]\nhistory_negatives = 2", "history_negatives"),
        ("mechanism = 'dp-sgd'\nepsilon = 3\n[training]\nlogq_correction = true", "logq_correction"),
        ("mechanism = 'dp-sgd'\nepsilon = 3\n[training]\ndropout = 0.1", "dropout"),
    ],
)
def test_a_configuration_that_contradicts_itself(tmp_path: Path, lines: str, complaint: str) -> None:
    (tmp_path / "run.toml").write_text(f"[privacy]\n{lines}\n")
    with pytest.raises(ConfigError, match=complaint):
        load_toml(tmp_path / "run.toml", RunConfig)
