"""Owners whose private values are all canaries, and what one of them leaks in the positive control."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from leaks import IDS, MISSED_IDS, MISSED_TEXTS, TEXTS

from clients.data.assemble import Settings
from clients.data.domain import Domain
from clients.data.prepare import prepare

USERS, ITEMS, HISTORY = 100, 200, 12


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


def make_shop(folder: Path, name: str, seed: int) -> Shop:
    """Write tables, and prepare the domain as an owner does."""
    rng = np.random.default_rng([seed, *name.encode()])
    tables, out = folder / "tables" / name, folder / "prepared" / name
    tables.mkdir(parents=True)
    users = [f"buyer-{rng.bytes(6).hex()}" for _ in range(USERS)]
    notes = [f"margin {rng.bytes(6).hex()}" for _ in range(ITEMS)]
    words = ("red", "blue", "oak", "tin", "cup", "pot", "lamp", "bowl", "small", "large", "spoon", "tea")
    with (tables / "items.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(("item_id", "title", "note"))
        for item in range(ITEMS):
            rows.writerow((f"{name}-{item:03d}", " ".join(rng.permutation(words)[:4]), notes[item]))
    times = []
    with (tables / "interactions.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(("user_id", "item_id", "timestamp"))
        for user in users:
            moments = np.sort(1_600_000_000 + rng.choice(10**8, HISTORY, replace=False)).tolist()
            for item, moment in zip(rng.permutation(ITEMS)[:HISTORY], moments, strict=True):
                rows.writerow((user, f"{name}-{item:03d}", moment))
            times.append(moments)
    domain = prepare(tables, out, name, Settings(k_core=0, public=("title",))).domain
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
