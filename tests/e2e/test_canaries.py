"""Canaries in private data, all traffic of a whole run in the clear: none crosses. Beside it, a leak: all do.

Two owners and the server are three network namespaces. Taps end TLS at the border and keep what is said;
packets are watched on both cables, so that nothing goes by the taps. See `border` and `common.audit.scan`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from border import Heard, LinkWatch, Tap, heard, recorded
from canaries import Shop, make_shop, plant
from checks import audit
from namespaces import Wire, wires
from shores import Federation, kill, run_config

from common.audit.scan import Scan, Scanner
from common.tls import TlsFiles

DOMAINS = ("garden", "kitchen")
LEAKY = Path(__file__).parents[1] / "leaky.py"
TRAINING = {"max_steps": 4, "eval_every_steps": 4, "checkpoint_every_steps": 4, "batch_size": 16}
MAX_OVERHEAD = 0.01  # of socket bytes over ledger bytes

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass
class Border:
    """The taps and watches of one federation."""

    capture: Path
    taps: dict[str, dict[str, Tap]] = field(default_factory=dict)
    watches: dict[str, LinkWatch] = field(default_factory=dict)
    lost_frames: int = 0

    def close(self) -> None:
        for tap in [tap for taps in self.taps.values() for tap in taps.values()]:
            tap.close()
        for name, watch in self.watches.items():
            self.lost_frames += watch.close()
            (self.capture / f"{name}-link").write_bytes(watch.kept)


@contextlib.contextmanager
def border(federation: Federation, links: dict[str, Wire]) -> Iterator[Border]:
    """Taps before the three ports of the server, for each owner, and a watch on its cable."""
    made = Border(federation.folder / "capture")
    made.capture.mkdir()
    keys = federation.server / "keys"
    server = TlsFiles(keys / "ca.crt", keys / "tls.crt", keys / "tls.key")
    for name, wire in links.items():
        own = federation.home(name) / "keys"
        owner = TlsFiles(own / "ca.crt", own / "tls.crt", own / "tls.key")
        made.watches[name] = LinkWatch(wire.server, wire.link, wire.server_address)
        made.taps[name] = {
            service: Tap(
                made.capture,
                f"{name}-{service}",
                space=wire.server,
                address=wire.server_address,
                target=federation.port + offset,
                server=server,
                alpn="http/1.1" if service == "fleet" else "h2",
                owner=owner if service == "exchange" else None,
            )
            for offset, service in enumerate(("fleet", "exchange", "enrol"))
        }
    try:
        yield made
    finally:
        made.close()


def run_captured(federation: Federation, shops: dict[str, Shop], leaks: dict[str, Any]) -> Border:
    """A whole federation, from joining to the installed model, with everything that crossed captured.

    `leaks` has what each leaking owner leaks. When this returns, every process has ended.
    """
    with wires(len(DOMAINS)) as made:
        links = dict(zip(DOMAINS, made, strict=True))
        federation.spaces = {"server": made[0].server, "run": made[0].server}
        hosts = [option for wire in made for option in ("--host", wire.server_address)]
        federation.init(*hosts, "--bind", "0.0.0.0")  # noqa: S104 - all of a namespace's own
        with border(federation, links) as crossing:
            federation.server_up()
            for name, wire in links.items():
                federation.spaces["client"] = wire.owner
                taps = crossing.taps[name].items()
                lead = {service: f"{wire.server_address}:{tap.port}" for service, tap in taps}
                federation.join(name, shops[name].domain, lead=lead)
                program = federation.program
                if name in leaks:
                    (federation.home(name) / "leaks.json").write_text(json.dumps(leaks[name]))
                    federation.program = [sys.executable, "-P", str(LEAKY)]
                federation.client_up(name)
                federation.program = program
            merge = [{"method": "task-arithmetic"}]
            run = federation.start_run(run_config(federation.base, merge=merge, training=TRAINING))
            state = federation.finish(run, patience_s=900)
            assert state["state"] == "done", state
            summary = federation.summary(run)["domains"]
            assert all(domain["delivered"] and not domain["lost"] for domain in summary.values())
            kill(*federation.alive())
    federation.spaces = {}  # they are gone
    return crossing


def check_link(crossing: Border, name: str) -> tuple[int, int]:
    """Nothing on the cable but ARP and the connections of the taps; the exchange's socket bytes."""
    watch, taps = crossing.watches[name], crossing.taps[name]
    assert crossing.lost_frames == 0
    assert set(watch.others) <= {"arp"}, watch.others
    carried = watch.tcp_bytes
    assert set(carried) == {tap.port for tap in taps.values()}
    for service, tap in taps.items():
        assert tap.connections and not tap.errors, tap.errors
        for direction, on_wire in zip(("up", "down"), carried[tap.port], strict=True):
            files = crossing.capture.glob(f"{name}-{service}-*.{direction}")
            in_clear = sum(path.stat().st_size for path in files)
            assert in_clear < on_wire, (service, direction)
    return carried[taps["exchange"].port]


def check_bytes(federation: Federation, crossing: Border, name: str) -> tuple[Heard, dict[str, Any]]:
    """Byte for byte what the ledger says is what was said; sockets carried little more. The figures.

    Only where a call was repeated, on a machine too busy to answer in time, more was said.
    """
    said, kept = heard(crossing.capture, f"{name}-exchange"), recorded(federation.ledger(name))
    socket = check_link(crossing, name)
    calls = said.calls - Counter(Status=said.calls["Status"])
    if calls == kept.calls:
        assert said.bytes == kept.bytes
    else:
        assert calls > kept.calls and all(np.greater_equal(said.bytes, kept.bytes))
    overhead = [(wire - part) / part for wire, part in zip(socket, said.bytes, strict=True)]
    total = (sum(socket) - said.strange) / sum(said.bytes) - 1
    figures = {"calls": dict(said.calls), "ledger": kept.bytes, "said": said.bytes, "socket": socket}
    assert 0 < total < MAX_OVERHEAD, figures
    return said, {**figures, "overhead": overhead, "total": total}


def scan(crossing: Border, canaries: list[str | list[int]]) -> tuple[Scan, float]:
    """What is found in all that was captured, and in how many seconds.

    All is de-framed but packets of the link, and what the nodes were saying when they were killed.
    """
    started_s = time.monotonic()
    found = Scanner(canaries).scan(crossing.capture)
    assert found.cut == []
    assert all("-link" in place or "-fleet-" in place for place in found.unframed), found.unframed
    return found, time.monotonic() - started_s


@pytest.fixture
def wide(
    federate: Callable[[Path], Federation], make_pico: Callable[..., Path], tmp_path: Path
) -> Federation:
    """A federation on a base of 13 MB: parcels of a size at which overhead can be spoken of."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    return federate(make_pico(tmp_path / "base", **sizes, initializer_range=0.05))


def test_no_canary_crosses_in_a_whole_run(wide: Federation) -> None:
    shops = {name: make_shop(wide.folder, name, seed=0) for name in DOMAINS}
    crossing = run_captured(wide, shops, {})
    assert audit(wide, DOMAINS)["clean"]
    figures = {name: check_bytes(wide, crossing, name) for name in DOMAINS}
    assert all(said.strange == 0 for said, _ in figures.values())
    canaries = [canary for shop in shops.values() for canary in shop.canaries]
    found, seconds = scan(crossing, canaries)
    print(f"\n{len(canaries)} canaries, {found.files} streams, {found.bytes:,} bytes, ", end="")
    print(f"{found.parts} parts, {found.searched_bytes:,} bytes searched in {seconds:.1f} s\n{figures}")
    assert found.hits == []


def test_every_leak_is_found_beside_it(wide: Federation) -> None:
    """The positive control: the audit is clean, since no leak passed the gate as itself; the scan is not."""
    shops = {name: make_shop(wide.folder, name, seed=1) for name in DOMAINS}
    planted = plant(shops["garden"])
    crossing = run_captured(wide, shops, {"garden": planted.leaks})
    assert audit(wide, DOMAINS)["clean"]
    said, figures = check_bytes(wide, crossing, "garden")
    assert said.strange == said.calls["Upload"] * sum(len(leak) // 2 for leak in planted.leaks["fields"])
    assert check_bytes(wide, crossing, "kitchen")[0].strange == 0
    names = [*planted.found, *planted.missed]
    canaries = [*planted.found.values(), *planted.missed.values(), *shops["kitchen"].canaries]
    found, seconds = scan(crossing, canaries)
    print(f"\n{len(planted.found)} leaks, {len(planted.missed)} misses, {said.strange} bytes in fields,")
    print(f"{found.bytes:,} bytes, {seconds:.1f} s\n{figures}")
    assert {names[index] for index in found.found if index < len(names)} == set(planted.found)
    assert max(found.found) < len(names)  # nothing of the owner that does not leak
    assert {hit.place.partition("-")[0] for hit in found.hits} == {"garden"}
