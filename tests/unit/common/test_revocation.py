"""The payload of a revocation: digests in one form, and nothing else."""

import json

import pytest

from common.errors import ParcelError
from common.revocation import Revocation

VECTOR, PAYLOAD = "a" * 64, "b" * 64


@pytest.mark.parametrize("models", [(), ("c" * 64,), tuple(f"{n:064x}" for n in range(12))])
def test_it_reads_back(models: tuple[str, ...]) -> None:
    said = Revocation(VECTOR, PAYLOAD, models)
    assert Revocation.decode(said.encode()) == said


@pytest.mark.parametrize(
    "values",
    [
        {"vector": VECTOR},
        {"vector": VECTOR, "payload": PAYLOAD, "why": "c" * 64},
        {"vector": VECTOR, "payload": PAYLOAD, "model-x": "c" * 64},
        {"vector": VECTOR, "payload": "withdrawn"},
        {"vector": VECTOR, "payload": 5},
        {"vector": VECTOR, "payload": PAYLOAD, "model-0": 0.5},
    ],
)
def test_anything_else_is_refused(values: dict[str, object]) -> None:
    data = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(ParcelError):
        Revocation.decode(data)


def test_what_is_no_digest_is_not_written() -> None:
    with pytest.raises(ParcelError, match="digests only"):
        Revocation(VECTOR, "withdrawn").encode()
