"""Canaries in private data, all traffic of a whole run in the clear: none crosses. Beside it, a leak: all do.

Two owners and the server are three network namespaces. Taps end TLS at the border and keep what is said;
packets are watched on both cables, so that nothing goes by the taps. See `border` and `common.audit.scan`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from border import LinkWatch, Tap, data_channel_bytes, ledger_bytes
from checks import audit
from leaks import IDS, MISSED_IDS, MISSED_TEXTS, TEXTS
from namespaces import Wire, wires
from shores import Federation, kill, run_config

from clients.data.assemble import Settings
from clients.data.domain import Domain
from clients.data.prepare import prepare
from common.audit.scan import Scan, Scanner
from common.tls import TlsFiles

DOMAINS = ("garden", "kitchen")
USERS, ITEMS, HISTORY = 100, 200, 12
LEAKY = Path(__file__).parents[1] / "leaky.py"
TRAINING = {"max_steps": 4, "eval_every_steps": 4, "checkpoint_every_steps": 4, "batch_size": 16}
MAX_OVERHEAD = 0.01  # of socket bytes over ledger bytes

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass
class Shop:
    """A domain made from tables in which every private value is a canary."""

    domain: Domain
    users: list[str]
    notes: list[str]  # a private column of the items
    times: list[list[int]]

    @property
    def histories(self) -> list[list[int]]:
        """Item indices in the order in which a user bought."""
        return [[int(item) for item in history] for history in self.domain.train]

    @property
    def canaries(self) -> list[str | list[int]]:
        """All of it; a history as the items' own names, too."""
        named = [[self.domain.item_ids[item] for item in history] for history in self.histories]
        texts = [between.join(names) for names in named for between in (",", " ", '","', '", "', "|")]
        days = [str(moment) for moments in self.times for moment in moments]
        return [*self.users, *self.notes, *texts, *days, *self.histories, *self.times]


def make_shop(federation: Federation, name: str, seed: int) -> Shop:
    """Write tables, and prepare the domain as an owner does."""
    rng = np.random.default_rng([seed, *name.encode()])
    folder = federation.folder / "tables" / name
    folder.mkdir(parents=True)
    users = [f"buyer-{rng.bytes(6).hex()}" for _ in range(USERS)]
    notes = [f"margin {rng.bytes(6).hex()}" for _ in range(ITEMS)]
    words = ("red", "blue", "oak", "tin", "cup", "pot", "lamp", "bowl", "small", "large", "spoon", "tea")
    with (folder / "items.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(("item_id", "title", "note"))
        for item in range(ITEMS):
            rows.writerow((f"{name}-{item:03d}", " ".join(rng.permutation(words)[:4]), notes[item]))
    times = []
    with (folder / "interactions.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(("user_id", "item_id", "timestamp"))
        for user in users:
            moments = np.sort(1_600_000_000 + rng.choice(10**8, HISTORY, replace=False)).tolist()
            for item, moment in zip(rng.permutation(ITEMS)[:HISTORY], moments, strict=True):
                rows.writerow((user, f"{name}-{item:03d}", moment))
            times.append(moments)
    out = federation.folder / "prepared" / name
    domain = prepare(folder, out, name, Settings(k_core=0, public=("title",))).domain
    order = [users.index(user) for user in domain.user_ids]
    assert sorted(order) == list(range(USERS)) and set(domain.attributes) == {"title", "note"}
    return Shop(domain, [users[u] for u in order], notes, [times[u] for u in order])


@dataclass
class Planted:
    """What the leaking owner leaks, and whether it must be found: canary -> encoded how, and where."""

    found: dict[str, str | list[int]] = field(default_factory=dict)
    missed: dict[str, str | list[int]] = field(default_factory=dict)
    leaks: dict[str, Any] = field(default_factory=dict)


def plant(shop: Shop) -> Planted:
    """One user, or one history, for each encoding and place, so that each find is of one leak."""
    users, histories = iter(shop.users), iter(shop.histories)
    made, fields = Planted(), []
    for table, values, to in (
        (TEXTS, users, made.found),
        (MISSED_TEXTS, users, made.missed),
        (IDS, histories, made.found),
        (MISSED_IDS, histories, made.missed),
    ):
        for name, encode in table.items():
            to[f"{name} in a field"] = value = next(values)
            fields.append(encode(value.encode() if isinstance(value, str) else value).hex())
    places = {
        "in a header": TEXTS["raw"],
        "in a binary header": TEXTS["base64 of gzip"],
        "in a posted body": TEXTS["raw"],
        "in a posted body, packed": TEXTS["zstd of json of bz2"],
    }
    sent = {}
    for place, encode in places.items():
        made.found[place] = user = next(users)
        sent[place] = encode(user.encode()).hex()
    made.found["in a tensor, as a trainer would"] = history = next(histories)
    header, packed, *posts = sent.values()
    metadata = {"x-note": header, "x-note-bin": packed}
    made.leaks = {"fields": fields, "metadata": metadata, "posts": posts}
    made.leaks["tensor"] = IDS["int32 little"](history).hex()
    return made


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
                if name in leaks:
                    (federation.home(name) / "leaks.json").write_text(json.dumps(leaks[name]))
                    federation.program = [sys.executable, "-P", str(LEAKY)]
                federation.client_up(name)
                federation.program = Federation(federation.folder / "other", federation.base).program
            merge = [{"method": "task-arithmetic"}]
            run = federation.start_run(run_config(federation.base, merge=merge, training=TRAINING))
            state = federation.finish(run, patience_s=900)
            assert state["state"] == "done", state
            summary = federation.summary(run)["domains"]
            assert all(domain["delivered"] and not domain["lost"] for domain in summary.values())
            kill(*federation.alive())
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


def check_bytes(federation: Federation, crossing: Border, name: str, leaked: int = 0) -> dict[str, Any]:
    """Byte for byte what the ledgers say is what was said; sockets carried little more. The figures."""
    in_ledger, socket = ledger_bytes(federation.ledger(name)), check_link(crossing, name)
    said, others = data_channel_bytes(crossing.capture, f"{name}-exchange")
    assert said == in_ledger
    assert others == leaked
    overhead = [(wire - kept) / kept for wire, kept in zip(socket, in_ledger, strict=True)]
    total = (sum(socket) - sum(in_ledger)) / sum(in_ledger)
    assert 0 < total - leaked / sum(in_ledger) < MAX_OVERHEAD, (total, overhead, socket, in_ledger)
    return {"ledger": in_ledger, "socket": list(socket), "overhead": overhead, "total": total}


def scan(crossing: Border, canaries: list[str | list[int]]) -> tuple[Scan, float]:
    """What is found in all that was captured, and in how many seconds."""
    started_s = time.monotonic()
    found = Scanner(canaries).scan(crossing.capture)
    assert found.cut == []
    assert all("-link" in place for place in found.unframed), found.unframed
    return found, time.monotonic() - started_s


@pytest.fixture
def wide(
    federate: Callable[[Path], Federation], make_pico: Callable[..., Path], tmp_path: Path
) -> Federation:
    """A federation on a base of 13 MB: parcels of a size at which overhead can be spoken of."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    return federate(make_pico(tmp_path / "base", **sizes, initializer_range=0.05))


def test_no_canary_crosses_in_a_whole_run(wide: Federation) -> None:
    shops = {name: make_shop(wide, name, seed=0) for name in DOMAINS}
    crossing = run_captured(wide, shops, {})
    assert audit(wide, DOMAINS)["clean"]
    figures = {name: check_bytes(wide, crossing, name) for name in DOMAINS}
    canaries = [canary for shop in shops.values() for canary in shop.canaries]
    found, seconds = scan(crossing, canaries)
    print(f"\n{len(canaries)} canaries, {found.files} streams, {found.bytes:,} bytes, ", end="")
    print(f"{found.parts} parts, {found.searched_bytes:,} bytes searched in {seconds:.1f} s\n{figures}")
    assert found.hits == []


def test_every_leak_is_found_beside_it(wide: Federation) -> None:
    """The positive control: the audit is clean, since no leak passed the gate as itself; the scan is not."""
    shops = {name: make_shop(wide, name, seed=1) for name in DOMAINS}
    planted = plant(shops["garden"])
    crossing = run_captured(wide, shops, {"garden": planted.leaks})
    assert audit(wide, DOMAINS)["clean"]
    uploads = sum(body["type"] == "parcel" and body["direction"] == "out" for body in wide.ledger("garden"))
    leaked = uploads * sum(len(leak) // 2 for leak in planted.leaks["fields"])
    figures = check_bytes(wide, crossing, "garden", leaked)
    check_bytes(wide, crossing, "kitchen")
    names = [*planted.found, *planted.missed]
    canaries = [*planted.found.values(), *planted.missed.values(), *shops["kitchen"].canaries]
    found, seconds = scan(crossing, canaries)
    print(
        f"\n{len(planted.found)} leaks and {len(planted.missed)} misses, {leaked} bytes in fields, ", end=""
    )
    print(f"{found.bytes:,} bytes, {seconds:.1f} s\n{figures}")
    assert {names[index] for index in found.found if index < len(names)} == set(planted.found)
    assert max(found.found) < len(names)  # nothing of the owner that does not leak
    assert {hit.place.partition("-")[0] for hit in found.hits} == {"garden"}
