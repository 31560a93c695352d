"""The root file: a threshold of keys, one version after the other, exact bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import canonical
from common.errors import ParcelError, SignatureError
from common.roots import Party, Root, RootMember, SignedRoot, Witness, log_origin, log_verifiers
from common.signing import SigningKey

KEYS = sorted((SigningKey(bytes([n]) * 32) for n in (1, 2, 3)), key=lambda key: key.public.hex)
STRANGER = SigningKey(b"x" * 32)
NOW_S = 1_000


def _hex(number: int) -> str:
    return SigningKey(bytes([number]) * 32).public.hex


def _root(**changes: Any) -> Root:
    member = RootMember(
        domain="toys",
        pseudonym="domain-1",
        identity_key=_hex(10),
        log_key=_hex(11),
        certificate_fingerprint="f" * 64,
    )
    facts: dict[str, Any] = {
        "version": 1,
        "created_s": NOW_S,
        "expires_s": NOW_S + 10_000,
        "threshold": 2,
        "root_keys": tuple(key.public.hex for key in KEYS),
        "server": Party(identity_key=_hex(12), log_key=_hex(13)),
        "witnesses": (Witness(name="w1.witness.example", key=_hex(14)),),
        "members": (member,),
    }
    return Root(**{**facts, **changes})


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    signed = SignedRoot.sign(_root(), KEYS[:2])
    signed.save(tmp_path / "root.json")
    read = SignedRoot.load(tmp_path / "root.json")
    assert read == signed
    assert read.root.parties() == {"server": signed.root.server, "toys": signed.root.members[0]}


def test_a_threshold_of_the_root_keys_must_sign() -> None:
    with pytest.raises(SignatureError, match="1 of 2"):
        SignedRoot.sign(_root(), KEYS[:1]).verify_self()
    with pytest.raises(SignatureError, match="1 of 2"):
        SignedRoot.sign(_root(), [KEYS[0], STRANGER]).verify_self()
    SignedRoot.sign(_root(), [KEYS[0], STRANGER]).with_signatures(KEYS[1:2]).verify_self()


def test_a_wrong_signature_is_worse_than_none() -> None:
    signed = SignedRoot.sign(_root(), KEYS)
    wrong = {**signed.signatures, KEYS[0].public.key_id: bytes(64)}
    with pytest.raises(SignatureError):
        SignedRoot(signed.root, wrong).verify_self()


def test_versions_follow_each_other() -> None:
    old = _root()
    SignedRoot.sign(_root(version=2), KEYS[:2]).verify_after(old, now_s=NOW_S)
    for version in (1, 3):  # a rollback, a gap
        with pytest.raises(ParcelError, match="does not follow"):
            SignedRoot.sign(_root(version=version), KEYS).verify_after(old, now_s=NOW_S)
    with pytest.raises(ParcelError, match="expired"):
        SignedRoot.sign(_root(version=2), KEYS).verify_after(old, now_s=NOW_S + 11_000)


def test_root_keys_rotate_with_both_thresholds() -> None:
    old, fresh = (
        _root(),
        sorted((SigningKey(bytes([n]) * 32) for n in (4, 5)), key=lambda key: key.public.hex),
    )
    new = _root(version=2, root_keys=tuple(key.public.hex for key in fresh))
    SignedRoot.sign(new, [*KEYS[:2], *fresh]).verify_after(old, now_s=NOW_S)
    for too_few in (fresh, KEYS, [*KEYS[:1], *fresh], [*KEYS, fresh[0]]):
        with pytest.raises(SignatureError):
            SignedRoot.sign(new, too_few).verify_after(old, now_s=NOW_S)


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 4},
        {"threshold": 0},
        {"version": 0},
        {"root_keys": ()},
        {"root_keys": (KEYS[1].public.hex, KEYS[0].public.hex)},
        {"root_keys": (KEYS[0].public.hex, KEYS[0].public.hex)},
        {"server": Party(identity_key=_hex(12), log_key=_hex(12))},
        {"server": Party(identity_key=_hex(10), log_key=_hex(13))},
        {"witnesses": (Witness(name="w", key=KEYS[0].public.hex),)},
        {"members": _root().members * 2},
    ],
)
def test_what_is_no_root(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        _root(**changes)


def test_a_file_that_is_not_exact_is_refused(tmp_path: Path) -> None:
    content = SignedRoot.sign(_root(), KEYS).encode()
    outer = json.loads(content)
    path = tmp_path / "root.json"
    wrong = [
        b"",
        b"{}",
        content[:-2],
        content.replace(b'":', b'": ', 1),
        canonical.encode({**outer, "more": 1}),
        canonical.encode({**outer, "root": {**outer["root"], "more": 1}}),
        canonical.encode({**outer, "root": {k: v for k, v in outer["root"].items() if k != "witnesses"}}),
        canonical.encode({**outer, "signatures": outer["signatures"][::-1]}),
        canonical.encode({**outer, "signatures": outer["signatures"] * 2}),
        canonical.encode({**outer, "signatures": [{**outer["signatures"][0], "more": 1}]}),
        canonical.encode({**outer, "signatures": "none"}),
    ]
    for data in wrong:
        path.write_bytes(data)
        with pytest.raises(ParcelError, match=r"root\.json"):
            SignedRoot.load(path)
    with pytest.raises(ParcelError, match="no such root file"):
        SignedRoot.load(tmp_path / "none.json")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_is_accepted(place: int, mask: int) -> None:
    content = bytearray(SignedRoot.sign(_root(), KEYS[:2]).encode())
    content[place % (len(content) - 1)] ^= mask
    with pytest.raises(ParcelError):
        SignedRoot.parse(bytes(content)).verify_self()


def test_origins_follow_from_keys() -> None:
    root = _root()
    verifier = log_verifiers("toys", root.members[0])[0]
    assert verifier.name == log_origin("toys", verifier.key)
    assert verifier.name.startswith("isthmus/toys/")
    assert log_verifiers("server", root.server)[0].name != verifier.name
