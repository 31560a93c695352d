"""Evo-Merging within a run: owners answer about candidates, and their losses are all that comes back."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from localgrid import KilledError, LocalFederation
from safetensors.torch import load_file
from test_language_rounds import language_run

from clients.explain import explanation, in_words
from clients.policy import EgressPolicy
from clients.privacy import AnswerLimits, privacy_of
from common.config import RunConfig
from common.errors import ConfigError, FederationError
from common.parcels import Header, Kind, Privacy
from server import rounds
from server.asking import generations_of
from server.federation import Control
from server.rounds import execute
from server.runs import Run
from tests.unit.language.conftest import build_causal

LABEL = "evo-merging"
GENERATIONS = 1 + 1 + 1 + 2


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "Control", partial(Control, sleep_s=0.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_causal(tmp_path_factory.mktemp("causal") / "base", "qwen2")


def policy(*, shares: bool = True, answers: bool = True, noise: float = 0.0) -> EgressPolicy:
    default = EgressPolicy()
    limits = AnswerLimits(min_users=4, noise_multiplier=noise)
    kinds = (*default.kinds, *([Kind.FITNESS] if answers else []))
    return EgressPolicy(kinds=kinds, share_adapter=shares, answers=limits)


@pytest.fixture
def federation(
    request: pytest.FixtureRequest, base: Path, make_domain: Callable[..., Any], tmp_path: Path
) -> Iterator[LocalFederation]:
    """Three domains; those that `request.param` names have another policy."""
    domains = ("books", "tea", "toys")
    policies = {domain: policy() for domain in domains} | getattr(request, "param", {})
    with LocalFederation(tmp_path, base, make_domain, domains, policies=policies) as federation:
        yield federation


def configured(base: Path) -> RunConfig:
    options = {"fitness": "domains", "ratio_iterations": 1, "scale_iterations": 2, "population": 4}
    merge = [{"method": LABEL, "options": options}]
    whole = language_run(base).model_dump(mode="json")
    return RunConfig.model_validate({**whole, "merge": merge, "publish": LABEL})


def begun(federation: LocalFederation) -> Run:
    from server.cli import create_run

    return create_run(federation.server(), configured(federation.base))


def answered(federation: LocalFederation, domain: str) -> list[dict[str, Any]]:
    text = (federation.path(domain) / "work" / "fits" / "answers" / "answers.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def fitness_of(federation: LocalFederation, run: Run) -> list[dict[str, Any]]:
    store = federation.server().store
    found = store.find(run=run.spec.run_id, kind=Kind.FITNESS)
    return [json.loads(store.read_bytes(stored.payload_digest)) for stored in found]


def test_numbers_go_out_and_losses_come_back(federation: LocalFederation) -> None:
    run, grid = begun(federation), federation.grid()
    assert generations_of(run.spec.config, 3) == GENERATIONS
    execute(grid, federation.server(), run)
    asked = Counter(action for _, action in grid.asked)
    assert asked == {"contribute": 3, "receive": 3, "score": 3 * GENERATIONS, "evaluate": 3, "install": 3}

    store = federation.server().store
    sent = [store.get(found.digest) for found in store.find(direction="out", kind=Kind.CANDIDATE)]
    tables = [
        {name: tuple(t.shape) for name, t in load_file(parcel.payload).items()} for parcel in sent if parcel
    ]
    numbers = [table for table in tables if set(table) == {"ratios", "scales"}]
    assert Counter(table["scales"] for table in numbers) == {(1, 3): 2, (4, 3): GENERATIONS - 2}
    assert all(table["ratios"] == table["scales"] for table in numbers)
    assert len(tables) == GENERATIONS + 3 + 1  # the three adapters, and the merge to evaluate
    evaluations = 1 + 4 + 1 + 2 * 4
    answers = fitness_of(federation, run)
    assert len(answers) == 3 * GENERATIONS
    assert sum(len(answer) - 1 for answer in answers) == 3 * evaluations
    for answer in answers:
        assert re.fullmatch("[0-9a-f]{64}", answer.pop("candidates"))
        assert all(type(value) is int and 0 <= value <= 10_000 for value in answer.values())
    assert all(len(answered(federation, domain)) <= evaluations for domain in federation.domains)

    record = json.loads((run.folder / "merges" / LABEL / "merge.json").read_text())
    assert set(record["coefficients"]["scales"]) == set(federation.domains)
    assert record["facts"]["evaluations"] == evaluations
    whole = "".join(path.read_text() for path in (run.folder / "model").glob("*.json"))
    assert not any(domain in whole for domain in federation.domains)  # pseudonyms alone


@pytest.mark.parametrize("killed", ["server", "owner"])
def test_after_a_kill_nobody_is_asked_for_what_was_answered(
    federation: LocalFederation, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    run, seen = begun(federation), []

    def intercept(domain: str, action: str, _message: Message) -> None:
        seen.append((domain, action))
        if seen.count(("tea", "score")) == 3:
            raise KilledError

    if killed == "owner":
        perform, calls = federation._run_job, []

        def dying(job: Any) -> dict[str, Any]:
            result = perform(job)
            calls.append(job.mode)
            if calls.count("answers") == 8:
                raise KilledError
            return result

        monkeypatch.setattr("clients.actions.run_job", dying)
    with pytest.raises(KilledError):
        execute(federation.grid(intercept if killed == "server" else None), federation.server(), run)
    before = {domain: len(answered(federation, domain)) for domain in federation.domains}
    grid = federation.grid()
    execute(grid, federation.server(), run)
    assert run.state["state"] == "done"
    assert Counter(action for _, action in grid.asked)["receive"] == 0
    answers = fitness_of(federation, run)
    assert len(answers) == 3 * GENERATIONS  # each generation once
    assert all(before.values())
    for domain in federation.domains:
        digests = [line["candidate"] for line in answered(federation, domain)]
        assert len(digests) == len(set(digests))


@pytest.mark.parametrize(
    "federation", [{"tea": policy(answers=False), "toys": policy(shares=False)}], indirect=True
)
def test_who_shares_nothing_is_left_out_and_who_answers_nothing_is_not_asked(
    federation: LocalFederation,
) -> None:
    run, grid = begun(federation), federation.grid()
    execute(grid, federation.server(), run)
    assert {domain for domain, action in grid.asked if action == "score"} == {"books", "toys"}
    assert ("tea", "receive", "policy") in [(d, action, reply["code"]) for d, action, reply in grid.replies]
    record = json.loads((run.folder / "merges" / LABEL / "merge.json").read_text())
    scales = record["coefficients"]["scales"]
    assert set(scales) == set(federation.domains)
    assert scales["toys"] == record["coefficients"]["ratios"]["toys"] == 0.0
    headers = [
        Header.stored(federation.server().store.read_bytes(found.digest))
        for found in federation.server().store.find(kind=Kind.TASK_VECTOR)
    ]
    assert {header.sender for header in headers if "shared" in header.training} == {"books", "tea"}


@pytest.mark.parametrize(
    "federation", [{d: policy(shares=d == "tea") for d in ("books", "tea", "toys")}], indirect=True
)
def test_one_shared_adapter_is_too_few(federation: LocalFederation) -> None:
    with pytest.raises(ConfigError, match="1 of 3 owners let their adapters be passed on, 2 are needed"):
        execute(federation.grid(), federation.server(), begun(federation))


@pytest.mark.parametrize(
    "federation", [{d: policy(answers=False) for d in ("books", "tea", "toys")}], indirect=True
)
def test_a_run_that_nobody_answers_says_so(federation: LocalFederation) -> None:
    with pytest.raises(FederationError, match="books: policy"):
        execute(federation.grid(), federation.server(), begun(federation))


@pytest.mark.parametrize("federation", [{"tea": policy(noise=2.0)}], indirect=True)
def test_noise_is_in_the_signed_header_and_in_what_the_policy_says(federation: LocalFederation) -> None:
    run = begun(federation)
    execute(federation.grid(), federation.server(), run)
    store = federation.server().store
    privacy = {
        Header.stored(store.read_bytes(found.digest)).sender: Header.stored(
            store.read_bytes(found.digest)
        ).privacy
        for found in store.find(run=run.spec.run_id, kind=Kind.FITNESS)
    }
    spent = privacy_of(AnswerLimits(min_users=4, noise_multiplier=2.0))
    assert privacy == {"books": Privacy(), "tea": spent, "toys": Privacy()}
    assert spent.epsilon_e6 > 0
    owner = federation.owner("tea")
    said = "\n".join(in_words(explanation(owner), owner.path / "policy.toml"))
    assert "about 1300 candidates in all, from 4 users or more, one user's loss cut at 10; noise 2" in said
    assert "an adapter is passed on to other domains of the run, under a pseudonym" in said
