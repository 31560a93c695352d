"""The data channel through a tap: what is heard is what the ledgers say, and a leak is heard beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from border import Tap, data_channel_bytes, ledger_bytes
from crossing import Owner, Shore, make_catalog, make_metrics, make_vector
from leaks import IDS, MISSED_TEXTS, TEXTS
from leaky import Leak, overwrite

from clients import exchange_client
from common.audit.scan import Scan, Scanner
from common.parcels import Kind

SIZES = {"layer.bias": (512,), "layer.weight": (2048, 512)}
USERS = [f"quokka-{number:04x}" for number in range(len(TEXTS) + len(MISSED_TEXTS) + 2)]
HISTORY = [212, 17, 230, 44, 101, 9, 151, 66, 203, 88]
CANARIES = [*USERS, HISTORY]


@pytest.fixture
def tapped(tmp_path: Path) -> Iterator[tuple[Owner, Tap, str]]:
    """An owner, and the tap that it takes for the server."""
    shore = Shore(tmp_path / "server", SIZES)
    owner = Owner(tmp_path / "owner", shore)
    capture = tmp_path / "capture"
    capture.mkdir()
    with shore.serve() as serving:
        tap = Tap(
            capture,
            "toys",
            space="",
            address="127.0.0.1",
            target=serving.port,
            server=shore.tls,
            alpn="h2",
            owner=owner.tls,
        )
        try:
            yield owner, tap, f"127.0.0.1:{tap.port}"
        finally:
            tap.close()


def cross(owner: Owner, address: str, history: list[int] | None = None) -> None:
    """A catalog, metrics and a vector up, a vector down. With `history` the trainer leaks it."""
    client = owner.client(address)
    vector = make_vector(owner.home / "vector.safetensors", tensors=SIZES)
    if history:
        overwrite(vector, IDS["int32 little"](history))
    for kind, payload in (
        (Kind.CATALOG, make_catalog(owner.home / "catalog.parquet", owner.domain)),
        (Kind.METRICS, make_metrics(owner.home / "metrics.json")),
        (Kind.TASK_VECTOR, vector),
    ):
        client.send(owner.gate.release(owner.draft(payload, kind), payload))
    published = owner.shore.publish(make_vector(owner.home / "merged.safetensors", 1, SIZES))
    client.fetch(published.digest, owner.home / "fetched")
    client.status()


def scan(tap: Tap) -> Scan:
    tap.close()
    assert not tap.errors
    found = Scanner(CANARIES).scan(tap.folder)
    assert found.unframed == [] and found.cut == []
    assert found.files == 2 * tap.connections
    return found


def test_what_is_heard_is_what_the_ledger_says_byte_for_byte(tapped: tuple[Owner, Tap, str]) -> None:
    owner, tap, address = tapped
    cross(owner, address)
    found = scan(tap)
    said, strange = data_channel_bytes(tap.folder, tap.name)
    assert said == ledger_bytes(entry.body for entry in owner.ledger)
    assert min(said) > 4 << 20 and strange == 0
    assert found.hits == []
    assert Scanner(["oak spoon", "red bowl"]).scan(tap.folder).found == {0, 1}  # the catalog is public


def test_leaks_past_the_gate_and_through_it_are_heard(
    tapped: tuple[Owner, Tap, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate lets pass what a trainer hides in numbers; no ledger has what went past the gate."""
    owner, tap, address = tapped
    header, packed, *users = USERS
    encoders = [*TEXTS.values(), *MISSED_TEXTS.values()]
    fields = [encode(user.encode()) for encode, user in zip(encoders, users, strict=True)]
    metadata = {"x-note": header.encode(), "x-note-bin": TEXTS["xz"](packed.encode())}
    leaks = {"fields": [leak.hex() for leak in fields]}
    leaks["metadata"] = {name: value.hex() for name, value in metadata.items()}
    connect = exchange_client.connect
    monkeypatch.setattr(
        exchange_client, "connect", lambda *given: grpc.intercept_channel(connect(*given), Leak(leaks))
    )
    cross(owner, address, HISTORY)
    found = scan(tap)
    missed = set(range(2 + len(TEXTS), len(USERS)))
    assert found.found == set(range(len(CANARIES))) - missed
    said, strange = data_channel_bytes(tap.folder, tap.name)
    assert said == ledger_bytes(entry.body for entry in owner.ledger)
    assert strange == 3 * sum(map(len, fields))
