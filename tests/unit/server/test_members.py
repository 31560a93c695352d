"""Invitations and members."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from crossing import NODE_KEY, Shore

from common.errors import FederationError, ParcelError, RefusedError, SignatureError
from common.signing import SigningKey
from common.tls import make_csr
from common.wire.enrolment import EnrolmentFacts


@pytest.fixture
def shore(tmp_path: Path) -> Shore:
    return Shore(tmp_path / "server")


def _log_key(key: SigningKey) -> SigningKey:
    return SigningKey(sha256(key.public.raw).digest())


def _facts(
    tmp_path: Path,
    token: str,
    key: SigningKey,
    domain: str = "toys",
    *,
    log_key: SigningKey | None = None,
) -> EnrolmentFacts:
    log_public = (log_key or _log_key(key)).public
    csr = make_csr(domain, tmp_path / "tls.key")
    return EnrolmentFacts(domain, token, key.public.hex, log_public.hex, csr, NODE_KEY)


def test_enrolment_is_single_use_but_repeatable(shore: Shore, tmp_path: Path) -> None:
    key, thief = SigningKey(bytes(32)), SigningKey(b"2" * 32)
    token = shore.invitations.invite("toys")
    assert token not in (shore.home / "invitations.json").read_text()
    facts = _facts(tmp_path, token, key)
    member = shore.enroller.enrol(facts, key.sign(facts.signed_bytes()))
    again = _facts(tmp_path, token, key)
    assert again.tls_csr != facts.tls_csr
    assert shore.enroller.enrol(again, key.sign(again.signed_bytes())) == member
    stolen = _facts(tmp_path, token, thief)
    with pytest.raises(RefusedError) as caught:
        shore.enroller.enrol(stolen, thief.sign(stolen.signed_bytes()))
    assert caught.value.reason == "token"
    shore.restart()
    assert shore.members.get("toys") == member
    assert shore.members.by_key_id(key.public.key_id) == member
    assert (member.node_id, member.is_revoked) == ("node-toys", False)


def test_refusals(shore: Shore, tmp_path: Path) -> None:
    key = SigningKey(bytes(32))
    token = shore.invitations.invite("toys")
    facts = _facts(tmp_path, token, key)
    with pytest.raises(SignatureError):
        shore.enroller.enrol(facts, bytes(64))
    for wrong in (_facts(tmp_path, "x", key), _facts(tmp_path, token, key, "beauty")):
        with pytest.raises(RefusedError):
            shore.enroller.enrol(wrong, key.sign(wrong.signed_bytes()))
    expired = _facts(tmp_path, shore.invitations.invite("toys", lifetime_s=-1), key)
    with pytest.raises(RefusedError, match="expired"):
        shore.enroller.enrol(expired, key.sign(expired.signed_bytes()))
    bad = replace(_facts(tmp_path, shore.invitations.invite("toys"), key), tls_csr=b"no csr")
    with pytest.raises(ParcelError):
        shore.enroller.enrol(bad, key.sign(bad.signed_bytes()))
    assert shore.members.all() == []


def test_keys_are_not_replaced_silently(shore: Shore, tmp_path: Path) -> None:
    old, new = SigningKey(bytes(32)), SigningKey(b"2" * 32)
    facts = _facts(tmp_path, shore.invitations.invite("toys"), old)
    shore.enroller.enrol(facts, old.sign(facts.signed_bytes()))
    other = _facts(tmp_path, shore.invitations.invite("toys"), new)
    with pytest.raises(RefusedError) as caught:
        shore.enroller.enrol(other, new.sign(other.signed_bytes()))
    assert caught.value.reason == "already-member"
    shore.members.revoke("toys", ledger_size=7)
    revoked = shore.members.get("toys")
    assert revoked is not None
    assert (revoked.is_revoked, revoked.revoked_size) == (True, 7)
    with pytest.raises(FederationError):
        shore.members.revoke("toys", ledger_size=8)
    assert shore.enroller.enrol(other, new.sign(other.signed_bytes())).identity_key == new.public.hex


def test_names(shore: Shore) -> None:
    for name in ("server", "Two Words", "", "../x", "a" * 41):
        with pytest.raises(FederationError):
            shore.invitations.invite(name)
    with pytest.raises(FederationError):
        shore.members.revoke("nobody", ledger_size=0)


def test_a_key_has_one_purpose_and_one_owner(shore: Shore, tmp_path: Path) -> None:
    toys, beauty = SigningKey(bytes(32)), SigningKey(b"2" * 32)
    both = _facts(tmp_path, shore.invitations.invite("toys"), toys, log_key=toys)
    with pytest.raises(RefusedError, match="another key"):
        shore.enroller.enrol(both, toys.sign(both.signed_bytes()))
    facts = _facts(tmp_path, shore.invitations.invite("toys"), toys)
    shore.enroller.enrol(facts, toys.sign(facts.signed_bytes()))
    for taken in (toys, _log_key(toys)):
        borrowed = _facts(tmp_path, shore.invitations.invite("beauty"), beauty, "beauty", log_key=taken)
        with pytest.raises(RefusedError, match="another key"):
            shore.enroller.enrol(borrowed, beauty.sign(borrowed.signed_bytes()))
