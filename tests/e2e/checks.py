"""What must hold after a run, whatever happened on the way; read from the homes alone."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shores import Federation, read_json

from common.models.base import model_digest

PEM_BODY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(.+?)-----END", re.DOTALL)
PRIVATE_FILES = ("identity.key", "log.key", "root.key", "tls.key", "flower.key", "ca.key", "superexec.secret")


def check_summary(summary: dict[str, Any], domains: Iterable[str], rows: Iterable[str]) -> None:
    """Every row has every metric of every domain, within (0, 1]."""
    assert set(rows) <= set(summary["results"])
    for row in rows:
        assert set(summary["results"][row]) == set(domains), row
        for domain, metrics in summary["results"][row].items():
            assert set(metrics) == {"recall@10", "ndcg@10"}, (row, domain)
            assert all(0.0 < value <= 1.0 for value in metrics.values()), (row, domain, metrics)


def check_model(folder: Path) -> None:
    """The published model loads without us, and both ways give a vector for a text."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    embedded = SentenceTransformer(str(folder), device="cpu").encode(["title: red spoon"])
    hidden = AutoModel.from_pretrained(folder).config.hidden_size
    assert embedded.shape == (1, hidden)


def installed_digest(federation: Federation, name: str) -> str:
    """The digest of the universal model that an owner has, computed anew."""
    folder = federation.home(name) / "models" / "current"
    assert folder.resolve().name == model_digest(folder)
    return folder.resolve().name


def check_ledgers(federation: Federation, names: Iterable[str]) -> None:
    """Both shores tell the same parcels, all are acknowledged, and an auditor finds nothing amiss."""
    server, names = federation.ledger(), list(names)
    report = audit(federation, names)
    assert report["clean"], report
    assert {shore["shore"] for shore in report["shores"]} == {"server", *names}
    for domain in report["domains"]:
        assert domain["domain"] not in names or domain["unacknowledged"] == [], domain
    for name in names:
        own = federation.ledger(name)
        up = {body["digest"] for body in own if _is(body, "out", "parcel")}
        assert up == {
            b["digest"] for b in server if _is(b, "in", "parcel", name) and b["verdict"] == "accepted"
        }
        down = {body["digest"] for body in own if _is(body, "in", "parcel")}
        assert down == {body["digest"] for body in server if _is(body, "out", "parcel", name)}
        for there, here in ((own, server), (server, own)):
            given = {b["digest"] for b in there if _is(b, "out", "receipt") and b["peer"] in (name, "server")}
            assert given <= {body["digest"] for body in here if _is(body, "in", "receipt")}


def audit(federation: Federation, names: Iterable[str]) -> dict[str, Any]:
    """What `isthmus audit verify` says of the homes as they are, each exported by its owner."""
    folder = federation.folder / "audit"
    for home in (federation.server, *map(federation.home, names)):
        federation.ok("audit", "bundle", home, "--out", folder / "bundle", "--payloads")
    federation.ok("server", "root", "--home", federation.server, "--out", folder / "root.json")
    done = federation.cli(
        "audit", "verify", folder / "bundle", "--root", folder / "root.json", "--format", "json"
    )
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["clean"] else 1)
    return found


def _is(body: dict[str, Any], direction: str, kind: str, peer: str = "") -> bool:
    return body["direction"] == direction and body["type"] == kind and peer in ("", body["peer"])


def accepted_vectors(federation: Federation, run: str) -> Counter[str]:
    """How many task vectors of each domain the server's ledger has as accepted in this run."""
    return Counter(
        body["peer"]
        for body in federation.ledger()
        if _is(body, "in", "parcel")
        and (body["kind"], body["run"], body["verdict"]) == ("task-vector", run, "accepted")
    )


def fit_folder(home: Path) -> Path:
    """The folder of the one fine-tuning that this owner ever began."""
    (clock,) = (home / "work").rglob("clock.json")
    return clock.parent


def fit_result(home: Path) -> dict[str, Any]:
    """The journal of that fine-tuning."""
    return read_json(fit_folder(home) / "result.json")


def private_parts(home: Path) -> dict[str, bytes]:
    """Every form in which a private key of `home` could have travelled: name -> bytes."""
    parts = {}
    for path in sorted((home / "keys").iterdir()):
        if path.name not in PRIVATE_FILES:
            continue
        content = path.read_bytes()
        parts[path.name] = content
        for body in PEM_BODY.findall(content):
            packed = b"".join(body.split())
            raw = base64.b64decode(packed)
            parts |= {f"{path.name} base64": packed, f"{path.name} bytes": raw, f"{path.name} end": raw[-32:]}
    for name, part in list(parts.items()):
        parts |= {f"{name} hex": part.hex().encode(), f"{name} in base64": base64.b64encode(part)}
    return parts


def check_no_secret(home: Path, elsewhere: Iterable[Path]) -> None:
    """No private key of `home` is in any file of the folders (or files) `elsewhere`."""
    parts = private_parts(home)
    assert len(parts) >= 12
    for place in elsewhere:
        files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
        assert files
        for path in files:
            content = path.read_bytes()
            found = [name for name, part in parts.items() if part in content]
            assert not found, f"{found} of {home} in {path}"
