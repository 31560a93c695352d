"""Every decoder, a little: what is read is exactly what was given, or refused by an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import IsthmusError
from fuzz.decoders import Decoder, made, names

EXAMPLES = 30


@pytest.fixture(scope="module", params=list(names()))
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    found = made(request.param, tmp_path_factory.mktemp(request.param))
    found.check()
    yield found
    found.close()


@given(choices=st.randoms(use_true_random=False))
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_it_is_read_exactly_or_refused_by_name(decoder: Decoder, choices: Random) -> None:
    try:
        decoder.read(decoder.given(choices))
    except IsthmusError:
        return
