"""Invitations and members."""

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


def _facts(tmp_path: Path, token: str, key: SigningKey, domain: str = "toys") -> EnrolmentFacts:
    return EnrolmentFacts(domain, token, key.public.hex, make_csr(domain, tmp_path / "tls.key"), NODE_KEY)


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
    bad = EnrolmentFacts("toys", shore.invitations.invite("toys"), key.public.hex, b"no csr", NODE_KEY)
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
    shore.members.revoke("toys")
    assert shore.enroller.enrol(other, new.sign(other.signed_bytes())).identity_key == new.public.hex


def test_names(shore: Shore) -> None:
    for name in ("server", "Two Words", "", "../x", "a" * 41):
        with pytest.raises(FederationError):
            shore.invitations.invite(name)
    with pytest.raises(FederationError):
        shore.members.revoke("nobody")
