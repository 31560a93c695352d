"""The data channel through a tap: what is heard is what the ledgers say, and a leak is heard beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from border import Heard, Tap, heard, recorded
from canaries import Shop, make_shop, plant
from crossing import Owner, Shore, make_catalog, make_metrics, make_vector
from flwr.app import Message
from flwr.common.serde import recorddict_to_proto
from leaks import IDS, MISSED_TEXTS, TEXTS
from leaky import Leak, overwrite
from localgrid import LocalFederation

from clients import actions, exchange_client
from clients.home import ClientHome
from clients.training.job import Job
from common.audit.scan import Scan, Scanner
from common.parcels import Kind
from common.tls import TlsFiles
from server.rounds import execute

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
    said = heard(tap.folder, tap.name)
    assert said.bytes == recorded(entry.body for entry in owner.ledger).bytes
    assert said.calls == {"Upload": 3, "Download": 1, "Acknowledge": 1, "Status": 1}
    assert min(said.bytes) > 4 << 20 and said.strange == 0
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
    said = heard(tap.folder, tap.name)
    assert said.bytes == recorded(entry.body for entry in owner.ledger).bytes
    assert said.strange == 3 * sum(map(len, fields))


# Whole runs, in one process: real homes, keys, trainer, TLS and gRPC; Flower's messages as it writes them.


@dataclass
class Tapped:
    """A finished run; all its taps are closed."""

    federation: LocalFederation
    capture: Path

    def scan(self, canaries: list[str | list[int]]) -> Scan:
        found = Scanner(canaries).scan(self.capture)
        assert found.cut == []
        assert all(place.startswith("control-") for place in found.unframed)  # messages, not streams
        return found

    def heard(self, name: str) -> Heard:
        """What was heard of one owner, which must be what its ledger says."""
        said, kept = heard(self.capture, name), recorded(e.body for e in self.federation.owner(name).ledger)
        assert (said.bytes, said.calls) == (kept.bytes, kept.calls)
        parcels, checkpoints = {"Upload", "Download", "Acknowledge"}, {"AddCheckpoint", "GetCheckpoint"}
        assert set(said.calls) == parcels | checkpoints
        return said


def run_tapped(
    folder: Path, base: Path, shops: dict[str, Shop], patch: Callable[[dict[str, str]], object]
) -> Tapped:
    """A whole run of `shops`. `patch` is called before it with the address that each owner knows."""
    capture = folder / "capture"
    capture.mkdir(parents=True)
    with (
        LocalFederation(folder, base, lambda name, **_: shops[name].domain, shops) as federation,
        ExitStack() as taps,
    ):
        server, leads = federation.server(), {}
        tls = TlsFiles(*(server.keys / name for name in ("ca.crt", "tls.crt", "tls.key")))
        for name in shops:
            owner = federation.owner(name)
            where = {"space": "", "address": "127.0.0.1", "target": server.config.ports.exchange}
            tap = Tap(capture, name, **where, server=tls, alpn="h2", owner=owner.tls)
            taps.callback(tap.close)
            leads[name] = f"127.0.0.1:{tap.port}"
            known = owner.config.server.model_copy(update={"exchange": leads[name]})
            ClientHome.write_config(owner.path, owner.config.model_copy(update={"server": known}))
        patch(leads)
        run, grid = federation.run(), federation.grid()
        deliver, count = grid._deliver, iter(range(1000))

        def kept(message: Message) -> Message:
            answer, number = deliver(message), next(count)
            for way, said in (("down", message), ("up", answer)):
                content = recorddict_to_proto(said.content).SerializeToString()
                (capture / f"control-{number:03d}.{way}").write_bytes(content)
            return answer

        grid._deliver = kept  # type: ignore[method-assign]
        execute(grid, server, run)
        assert federation.delivered(run) and len(grid.replies) == 3 * len(shops)
    return Tapped(federation, capture)


def test_no_canary_crosses_in_a_whole_run(tmp_path: Path, pico_model: Path) -> None:
    shops = {name: make_shop(tmp_path, name, seed=0) for name in ("garden", "kitchen")}
    tapped = run_tapped(tmp_path / "run", pico_model, shops, lambda _: None)
    assert all(tapped.heard(name).strange == 0 for name in shops)
    canaries = [canary for shop in shops.values() for canary in shop.canaries]
    assert len(canaries) == 4400
    assert tapped.scan(canaries).hits == []
    public = [shop.domain.attributes["title"][7] for shop in shops.values()]
    assert tapped.scan(public).found == {0, 1}  # what may cross did, and was heard


@pytest.mark.slow
def test_every_leak_of_an_owner_is_found_in_a_whole_run(
    tmp_path: Path, pico_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shops = {name: make_shop(tmp_path, name, seed=1) for name in ("garden", "kitchen")}
    planted = plant(shops["garden"])
    posted = {name for name in planted.found if "posted" in name}  # the control channel's port: see e2e

    def patch(leads: dict[str, str]) -> None:
        connect, run_job = exchange_client.connect, actions.run_job

        def leaking_connect(address: str, *given: object) -> object:
            channel = connect(address, *given)
            leak = Leak(planted.leaks)
            return grpc.intercept_channel(channel, leak) if address == leads["garden"] else channel

        def leaking_job(job: Job) -> dict[str, Any]:
            result = run_job(job)
            if job.mode == "fit" and Path(job.domain).name == "garden":
                overwrite(Path(result["vector_path"]), bytes.fromhex(planted.leaks["tensor"]))
            return result

        monkeypatch.setattr(exchange_client, "connect", leaking_connect)
        monkeypatch.setattr(actions, "run_job", leaking_job)

    tapped = run_tapped(tmp_path / "run", pico_model, shops, patch)
    leaked, said = sum(len(leak) // 2 for leak in planted.leaks["fields"]), tapped.heard("garden")
    assert said.strange == said.calls["Upload"] * leaked
    assert tapped.heard("kitchen").strange == 0
    leaks = {**planted.found, **planted.missed}
    found = tapped.scan([*leaks.values(), *shops["kitchen"].canaries])
    assert {list(leaks)[index] for index in found.found} == set(planted.found) - posted
    assert {hit.place.partition("-")[0] for hit in found.hits} == {"garden"}
