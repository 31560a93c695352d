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
from typer.testing import CliRunner

from clients.explain import explanation, in_words
from clients.policy import EgressPolicy
from clients.privacy import AnswerLimits, privacy_of
from common.audit.cli import app as audit
from common.config import RunConfig
from common.errors import ConfigError, FederationError
from common.files import sha256_file
from common.parcels import Header, Kind, Privacy
from server import rounds, withdrawal
from server.asking import generations_of
from server.federation import Control
from server.rounds import execute
from server.runs import Run
from server.withdrawal import execute_withdrawal, withdraw
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
    """The domains of `request.param` with their policies, or two."""
    policies = getattr(request, "param", {"books": policy(), "tea": policy(noise=2.0)})
    with LocalFederation(tmp_path, base, make_domain, policies, policies=policies) as federation:
        yield federation


def configured(base: Path) -> RunConfig:
    options = {"fitness": "domains", "ratio_iterations": 1, "scale_iterations": 2, "population": 4}
    merge = [{"method": LABEL, "options": options}]
    whole = language_run(base).model_dump(mode="json")
    few = {**whole["evaluation"], "max_users": 8}
    return RunConfig.model_validate({**whole, "evaluation": few, "merge": merge, "publish": LABEL})


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


def headers(federation: LocalFederation, **wanted: Any) -> list[Header]:
    store = federation.server().store
    return [Header.stored(store.read_bytes(found.digest)) for found in store.find(**wanted)]


def test_numbers_go_out_and_losses_come_back(federation: LocalFederation) -> None:
    run, grid = begun(federation), federation.grid()
    assert generations_of(run.spec.config, 2) == GENERATIONS
    execute(grid, federation.server(), run)
    store = federation.server().store
    sent = [store.get(found.digest) for found in store.find(direction="out", kind=Kind.CANDIDATE)]
    tables = [
        {name: tuple(t.shape) for name, t in load_file(parcel.payload).items()} for parcel in sent if parcel
    ]
    numbers = [table for table in tables if set(table) == {"ratios", "scales"}]
    made = len(numbers)  # one fewer where the second stage begins with what the first began with
    assert GENERATIONS - 1 <= made <= GENERATIONS
    assert Counter(table["scales"] for table in numbers) == {
        (1, 2): made - GENERATIONS + 2,
        (4, 2): GENERATIONS - 2,
    }
    asked = Counter(action for _, action in grid.asked)
    assert asked == {"contribute": 2, "receive": 2, "score": 2 * made, "evaluate": 2, "install": 2}

    assert all(table["ratios"] == table["scales"] for table in numbers)
    assert len(tables) == made + 2 + 1  # both adapters, and the merge to evaluate
    evaluations = 1 + 4 + 1 + 2 * 4
    answers = fitness_of(federation, run)
    assert len(answers) == 2 * made
    assert sum(len(answer) - 1 for answer in answers) == 2 * (evaluations - GENERATIONS + made)
    for answer in answers:
        assert re.fullmatch("[0-9a-f]{64}", answer.pop("candidates"))
        assert all(type(value) is int and 0 <= value <= 10_000 for value in answer.values())
    assert all(len(answered(federation, domain)) <= evaluations for domain in federation.domains)

    record = json.loads((run.folder / "merges" / LABEL / "merge.json").read_text())
    assert set(record["coefficients"]["scales"]) == set(federation.domains)
    assert record["facts"]["evaluations"] == evaluations
    whole = "".join(path.read_text() for path in (run.folder / "model").glob("*.json"))
    assert not any(domain in whole for domain in federation.domains)  # pseudonyms alone

    privacy = {
        header.sender: header.privacy
        for header in headers(federation, kind=Kind.FITNESS, run=run.spec.run_id)
    }
    spent = privacy_of(AnswerLimits(min_users=4, noise_multiplier=2.0))
    assert privacy == {"books": Privacy(), "tea": spent}
    assert spent.epsilon_e6 > 0
    owner = federation.owner("tea")
    said = "\n".join(in_words(explanation(owner), owner.path / "policy.toml"))
    assert "about 1300 candidates in all, from 4 users or more, one user's loss cut at 10; noise 2" in said
    assert "an adapter is passed on to other domains of the run, under a pseudonym" in said
    check_audit(federation, spent, made)


def check_audit(federation: LocalFederation, spent: Privacy, answers: int) -> None:
    """Clean, with every answer counted and the budget of answers told once."""
    bundle, root = federation.folder / "bundle", federation.server_path / "root.json"
    made = CliRunner().invoke(audit, ["bundle", str(federation.folder), "--out", str(bundle), "--payloads"])
    assert made.exit_code == 0, made.output
    found = CliRunner().invoke(audit, ["verify", str(bundle), "--root", str(root), "--format", "json"])
    assert found.exit_code == 0, found.output
    (tea,) = [domain for domain in json.loads(found.output)["domains"] if domain["domain"] == "tea"]
    assert tea["sent"]["fitness"]["count"] == answers
    assert [spend["epsilon_e6"] for spend in tea["privacy"]] == [spent.epsilon_e6]


def test_after_kills_nobody_is_asked_for_what_was_answered(
    federation: LocalFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen, modes = begun(federation), [], []
    perform = federation._run_job

    def owner_dies(job: Any) -> dict[str, Any]:
        result = perform(job)
        modes.append(job.mode)
        if modes.count("answers") == 4:
            raise KilledError  # it has the numbers, and nothing was sent
        return result

    def server_dies(domain: str, action: str, _message: Message) -> None:
        seen.append((domain, action))
        if seen.count(("tea", "score")) == 2:
            raise KilledError

    monkeypatch.setattr("clients.actions.run_job", owner_dies)
    with pytest.raises(KilledError):
        execute(federation.grid(), federation.server(), run)
    with pytest.raises(KilledError):
        execute(federation.grid(server_dies), federation.server(), run)
    grid = federation.grid()
    execute(grid, federation.server(), run)
    assert run.state["state"] == "done"
    assert "receive" not in {action for _, action in grid.asked}
    assert modes.count("fit") == 2
    answered_to = Counter(answer["candidates"] for answer in fitness_of(federation, run))
    assert set(answered_to.values()) == {2}  # each generation once by each
    assert GENERATIONS - 1 <= len(answered_to) <= GENERATIONS
    for domain in federation.domains:
        digests = [line["candidate"] for line in answered(federation, domain)]
        assert len(digests) == len(set(digests))


@pytest.mark.parametrize(
    "federation",
    [{"books": policy(), "tea": policy(answers=False), "toys": policy(shares=False)}],
    indirect=True,
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
    vectors = headers(federation, kind=Kind.TASK_VECTOR)
    assert {header.sender for header in vectors if "shared" in header.training} == {"books", "tea"}


@pytest.mark.parametrize("federation", [{name: policy() for name in ("books", "tea", "toys")}], indirect=True)
def test_without_a_withdrawn_vector_the_others_are_asked_anew(
    federation: LocalFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(withdrawal, "Control", partial(Control, sleep_s=0.0))
    run = begun(federation)
    execute(federation.grid(), federation.server(), run)
    (gone,) = headers(federation, kind=Kind.TASK_VECTOR, sender="toys")
    again, grid = withdraw(federation.server(), "toys"), federation.grid()
    execute_withdrawal(grid, federation.server(), again)
    asked = Counter(asked for asked in grid.asked if asked[1] in ("receive", "score"))
    assert asked == {
        (domain, action): count
        for domain in ("books", "tea")
        for action, count in (("receive", 1), ("score", GENERATIONS))
    }
    scales = json.loads((again.folder / "merges" / LABEL / "merge.json").read_text())["coefficients"][
        "scales"
    ]
    assert set(scales) == {"books", "tea"}
    for domain in federation.domains:  # its adapter is in no pool any more
        pools = federation.path(domain).glob("work/*/pool/*.payload")
        assert gone.payload_digest not in {sha256_file(file) for file in pools}


@pytest.mark.parametrize("federation", [{"books": policy(shares=False), "tea": policy()}], indirect=True)
def test_one_shared_adapter_is_too_few(federation: LocalFederation) -> None:
    with pytest.raises(ConfigError, match="1 of 2 owners let their adapters be passed on, 2 are needed"):
        execute(federation.grid(), federation.server(), begun(federation))


@pytest.mark.parametrize(
    "federation", [{"books": policy(answers=False), "tea": policy(answers=False)}], indirect=True
)
def test_a_run_that_nobody_answers_says_so(federation: LocalFederation) -> None:
    with pytest.raises(FederationError, match="books: policy"):
        execute(federation.grid(), federation.server(), begun(federation))
