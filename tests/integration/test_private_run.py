"""A run with differential privacy: what the headers say, what the owners book, and whom a plain run loses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from localgrid import LocalFederation, pico_run_config

from clients.policy import EgressPolicy
from clients.privacy import PrivacyLimits, spent
from common.config import RunConfig
from common.parcels import Header, Kind
from server import rounds
from server.cli import create_run
from server.federation import Control
from server.rounds import execute


def private_config(base: Path) -> RunConfig:
    document = pico_run_config(base).model_dump()
    document["privacy"] |= {"mechanism": "dp-sgd", "epsilon": 8.0, "negatives": 4}
    return RunConfig.model_validate(document)


def test_the_headers_say_what_was_spent_and_a_plain_run_is_refused(
    tmp_path: Path, pico_model: Path, make_domain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "Control", partial(Control, sleep_s=0.0))
    policies = {"toys": EgressPolicy(privacy=PrivacyLimits(max_epsilon=9.0, max_total_epsilon=12.0))}
    with LocalFederation(tmp_path, pico_model, make_domain, policies=policies) as federation:
        for _ in range(2):  # the second run gets the same vectors, for nothing more
            run = create_run(federation.server(), private_config(pico_model))
            execute(federation.grid(), federation.server(), run)
            assert run.state["state"] == "done"
            store = federation.server().store
            stored = store.find(run=run.spec.run_id, kind=Kind.TASK_VECTOR)
            claims = [Header.stored(store.read_bytes(parcel.digest)).privacy for parcel in stored]
            assert {(claim.mechanism, claim.clip_e6, claim.delta_e12) for claim in claims} == {
                ("dp-sgd", 1_000_000, 10_000_000)
            }
            assert all(7_900_000 < claim.epsilon_e6 <= 8_000_000 for claim in claims)
            for domain in federation.domains:
                booked = spent(federation.owner(domain).journal)
                assert (booked.vectors, booked.unprotected) == (1, 0)
                assert booked.epsilon == claims[0].epsilon_e6 / 1e6

        plain = federation.run(quorum=1)
        grid = federation.grid()
        execute(grid, federation.server(), plain)
        assert {reply["code"] for domain, _, reply in grid.replies if domain == "toys"} == {"policy"}
        assert {sender for sender, _, _ in federation.delivered(plain)} == {"books"}
        assert spent(federation.owner("books").journal).unprotected == 1
