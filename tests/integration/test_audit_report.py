"""The audit's page: what a clean and a falsified bundle give, and that nothing in a bundle becomes markup."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from crossing import make_vector
from markup import Page
from test_audit import ROOT_KEY, World, _bodies, _own_signer, _write
from typer.testing import CliRunner

from common.audit.bundle import Bundle
from common.audit.cli import app
from common.audit.opened import MOST_TENSORS
from common.audit.outcome import LIMITS
from common.audit.report import MOST_FINDINGS, MOST_KINDS, render
from common.audit.verify import verify
from common.audit.words import GLOSSARY, KINDS, MEANINGS
from common.ledger import Crossing
from common.pages import DASH
from common.parcels import SERVER, Kind, Privacy, seal_parcel
from common.roots import SignedRoot, Witness
from common.signing import SigningKey

HOSTILE = "</style></title><script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def bundle(world: World, tmp_path: Path) -> Bundle:
    return world.bundle(tmp_path / "bundle")


def page(world: World, bundle: Bundle, name: str = "autumn") -> Page:
    found = verify(bundle, world.root())
    return Page(render(found, world.root(), name=name, checked_s=1_795_000_000))


def forged(world: World, bundle: Bundle, entries: list[Crossing], shore: str = SERVER) -> Page:
    """The page when `shore` writes more entries into its ledger and signs it anew."""
    bodies = [*_bodies(bundle, shore), *map(asdict, entries)]
    _write(bundle, shore, bodies, _own_signer(world, shore))
    return page(world, bundle)


def test_a_clean_bundle_from_the_verdict_to_the_limits(world: World, bundle: Bundle) -> None:
    found = page(world, bundle)
    assert found.loads_nothing()
    entries = sum(len(_bodies(bundle, shore)) for shore in bundle.shores())
    assert f"Clean: no findings in {entries} entries of 3 ledgers." in found.text
    assert "18 Nov 2026, 11:06 UTC" in found.text and "version 1" in found.text and "autumn" in found.text
    assert ROOT_KEY.public.fingerprint in found.text
    for owner in world.owners():
        assert f"What {owner.domain} sent and received" in found.text
        assert owner.key.public.key_id in found.text
    assert found.labelled("task-vector")[0][:3] == ["task-vector", "sent", "1"]
    assert found.labelled("task-vector")[1][:3] == ["task-vector", "sent", "3"]
    assert found.labelled("toys")[0][-2:] == ["1", "0"]  # unacknowledged, findings
    for words in (LIMITS, GLOSSARY, KINDS):
        for word in words:
            assert word[1:] in found.text, word
    assert found.text.index("Findings") < found.text.index("What is not proven", 2000)


def test_every_parcel_is_opened_to_its_header_and_tensors(world: World, bundle: Bundle) -> None:
    found = page(world, bundle)
    digests = {b["digest"] for s in bundle.shores() for b in _bodies(bundle, s) if b["type"] == "parcel"}
    assert sum(name == "details" for name, _ in found.tags) == len(digests)
    assert all(digest in found.text for digest in digests)
    for fact in world.model.header.tensors:
        assert [fact.name, " \N{MULTIPLICATION SIGN} ".join(map(str, fact.shape)), "F32", fact.digest] in (
            found.rows
        )
    assert world.model.header.nonce in found.text
    assert "yes; digest, size and content are what the header says" in found.text
    assert "refused: wrong-run" in found.text and "unacknowledged" in found.text
    shutil.rmtree(bundle.path / "payloads")
    assert "no; the payload is not in the bundle" in page(world, bundle).text


def test_findings_are_named_in_plain_words(world: World, bundle: Bundle) -> None:
    accepted = next(b for b in _bodies(bundle, SERVER) if b["kind"] == "metrics" and b["type"] == "parcel")
    claim = Crossing(**{**accepted, "digest": "ab" * 32})
    index = len(_bodies(bundle, SERVER))
    found = forged(world, bundle, [claim])
    assert "Not clean: 2 findings in the ledger of server." in found.text
    assert found.text.count(f"Ledger of server, entry {index}") == 2
    for code in ("header", "never-sent"):
        assert MEANINGS[code] in found.text
    assert "with a finding" in found.text


def test_nothing_in_a_bundle_becomes_markup(world: World, bundle: Bundle) -> None:
    def entries(peer: str) -> list[Crossing]:
        return [
            Crossing(way, channel, type_, "ab" * 32, 5, who, HOSTILE, HOSTILE, verdict, time_s)
            for way in ("in", "out")
            for channel, type_ in (("data", "parcel"), ("data", "receipt"), ("control", "message"))
            for who, verdict, time_s in ((HOSTILE, "accepted", 2**53 - 1), (peer, HOSTILE, 0), (peer, "", 1))
        ]

    (bundle.path / "shores" / "beauty" / "checkpoint").write_text(HOSTILE)
    forged(world, bundle, entries(SERVER), "toys")
    found = forged(world, bundle, entries("toys"))
    assert found.loads_nothing()
    for where in (f"From {HOSTILE}", f"to {HOSTILE}"):
        assert where in found.text
    assert [row[1] for row in found.labelled(HOSTILE)] == ["sent", "received"]  # a kind in the table of toys
    named = page(world, bundle, name=HOSTILE)
    assert named.loads_nothing() and f"Bundle{HOSTILE}" in named.text


@pytest.mark.parametrize("shore", [SERVER, "toys"])
def test_a_forged_ledger_cannot_make_the_page_long(world: World, bundle: Bundle, shore: str) -> None:
    size = len(page(world, bundle).source)
    peer = SERVER if shore == "toys" else "toys"
    entries = [
        Crossing(
            "in", "data", "parcel", f"{n:064x}", 5, peer, f"k{n}" + "x" * 5_000, "r" * 5_000, "accepted", n
        )
        for n in range(120)
    ]
    found = forged(world, bundle, entries, shore)
    assert len(found.source) < size + 400_000  # of 1.2 MB that were added
    assert found.source.count("<li><h3>") == MOST_FINDINGS  # of two for each entry
    assert "isthmus audit verify lists them all" in found.text
    assert shore == SERVER or found.labelled(f"{len(entries) + 3 - MOST_KINDS} more kinds")


def test_tensor_tables_end_where_the_page_would_be_too_long(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST_TENSORS > 10_000
    monkeypatch.setattr("common.audit.opened.MOST_TENSORS", 3)
    found = page(world, bundle)
    assert "2 tensors, 36 numbers. The table is left out" in found.text
    assert "layer.weight" in found.text


def test_privacy_that_is_claimed_for_some_parcels_is_not_said_of_all(
    world: World, bundle: Bundle, tmp_path: Path
) -> None:
    payload = make_vector(tmp_path / "private", 4)
    spent = Privacy(mechanism="dp-sgd", clip_e6=1, noise_e6=2, epsilon_e6=3_500_000, delta_e12=5)
    parcel = seal_parcel(world.toys.draft(payload, privacy=spent), payload, world.toys.key)
    bundle.put_envelopes([parcel.envelope])
    size = len(parcel.envelope) + parcel.header.payload_bytes
    entry = Crossing("out", "data", "parcel", parcel.digest, size, SERVER, "task-vector", "demo")
    found = forged(world, bundle, [entry], "toys")
    assert "task-vector: epsilon 3.5, delta 5e-12 claimed for 1 of 4" in found.text
    assert "dp-sgd: epsilon 3.5, delta 5e-12, clip 1e-06, noise 2e-06" in found.text
    assert found.labelled("toys")[0][3] == "3.51 parcel"
    assert found.labelled("beauty")[0][3] == DASH


def test_what_witnesses_see_is_not_a_dealing_with_strangers(world: World, bundle: Bundle) -> None:
    witness = Witness(name="example", key=SigningKey(b"w" * 32).public.hex)
    root = world.root().model_copy(update={"witnesses": (witness,)})
    entry = Crossing("out", "data", "checkpoint", "ab" * 32, 300, witness.peer, "checkpoint", "demo", "", 1)
    _write(bundle, SERVER, [*_bodies(bundle, SERVER), asdict(entry)], _own_signer(world, SERVER))
    found = render(verify(bundle, root), root, name="autumn", checked_s=1_795_000_000)
    assert "server, to witnesses and to everybody" in found
    assert "others, not in the root file" not in found


def test_a_withdrawn_vector_is_said_with_its_domain(world: World, bundle: Bundle) -> None:
    report = verify(bundle, world.root())
    item: dict[str, int | str] = {"run": "demo", "shore": "toys", "index": 3, "vector": "ab" * 32}
    report.domains[1].withdrawn = [{**item, "revocation": "cd" * 32, "told": True, "asked": True}]
    found = Page(render(report, world.root(), name="autumn", checked_s=1_795_000_000))
    assert "withdrawn, as it asked: the task vector of run demo, entry 3 of toys" in found.text


def test_a_bundle_without_ledgers_is_not_clean(world: World, bundle: Bundle) -> None:
    for shore in bundle.shores():
        shutil.rmtree(bundle.path / "shores" / shore)
    assert [finding.code for finding in verify(bundle, world.root()).all_findings] == ["no-ledger"]
    assert "Nothing checked: the bundle holds no ledger." in page(world, bundle).text


def test_a_missing_ledger_is_said_on_top(world: World, bundle: Bundle) -> None:
    shutil.rmtree(bundle.path / "shores" / "toys")
    found = page(world, bundle)
    assert "The ledger of toys is not in the bundle." in found.text
    assert "Of single domains" in found.text
    assert "its ledger is not in the bundle" in found.text


def test_every_finding_has_plain_words_and_a_line_in_the_documentation() -> None:
    rows = (DOCS / "audit.md").read_text().partition("## Findings")[2].partition("\n## ")[0].splitlines()
    codes = {
        part.strip(" `") for row in rows if row.startswith("| `") for part in row.split("|")[1].split(",")
    }
    assert codes <= set(MEANINGS) and len(codes) > 20, (
        "a code of docs/audit.md needs its sentence in common/audit/words.py"
    )
    assert {kind.value for kind in Kind} | {"receipt", "message", "checkpoint", "keys"} == set(KINDS)


def test_the_command(world: World, bundle: Bundle, tmp_path: Path) -> None:
    root, out = tmp_path / "root.json", tmp_path / "audit.html"
    SignedRoot.sign(world.root(), [ROOT_KEY]).save(root)

    def run(*more: Any) -> Any:
        return CliRunner().invoke(app, ["report", str(bundle.path), "--root", str(root), *map(str, more)])

    found = run("--out", out)
    assert (found.exit_code, "Clean" in out.read_text()) == (0, True)
    bodies = _bodies(bundle, "toys")
    bodies[1]["size_bytes"] += 1
    _write(bundle, "toys", bodies)
    found = run("--out", out)
    assert (found.exit_code, "Not clean" in out.read_text()) == (1, True)
    assert "NOT CLEAN" in found.output
    out.unlink()
    root.write_text(json.dumps({}))
    assert run("--out", out).exit_code != 0
    assert not out.exists()
