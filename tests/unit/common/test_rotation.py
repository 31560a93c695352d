"""A rotation counts only with both signatures over one statement."""

import json

import pytest

from common import canonical
from common.errors import ParcelError, SignatureError
from common.rotation import Rotation, ShoreKeys
from common.signing import SigningKey

OLD, NEW, LOG, OTHER = (SigningKey(letter * 32) for letter in (b"o", b"n", b"l", b"x"))


def _outer(rotation: Rotation) -> dict[str, str]:
    return dict(json.loads(rotation.data))


def test_it_is_read_as_it_was_made() -> None:
    made = Rotation.make("toys", OLD, NEW, LOG.public)
    assert Rotation.open(made.data) == made
    assert made == Rotation.make("toys", OLD, NEW, LOG.public)  # the same again after a crash
    keys = made.keys
    assert (keys.shore, keys.replaces, keys.identity_key) == ("toys", OLD.public.hex, NEW.public.hex)


def test_both_keys_must_sign() -> None:
    good = _outer(Rotation.make("toys", OLD, NEW, LOG.public))
    keys = Rotation.make("toys", OLD, NEW, LOG.public).keys
    for name in good:
        forged = canonical.encode({**good, name: keys.seal(OTHER).decode()}, max_bytes=1 << 22)
        with pytest.raises(SignatureError):
            Rotation.open(forged)


def test_both_must_say_the_same() -> None:
    good = _outer(Rotation.make("toys", OLD, NEW, LOG.public))
    other = _outer(Rotation.make("books", OLD, NEW, LOG.public))
    first = ShoreKeys(shore="toys", identity_key=NEW.public.hex, log_key=LOG.public.hex)
    for outer in (
        {**good, "by_old": other["by_old"]},
        {"by_new": first.seal(NEW).decode(), "by_old": first.seal(OLD).decode()},  # it replaces nothing
        {**good, "note": ""},
        {"by_new": good["by_new"]},
        {**good, "by_old": 1},
        [good],
    ):
        with pytest.raises(ParcelError):
            Rotation.open(canonical.encode(outer, max_bytes=1 << 22))
