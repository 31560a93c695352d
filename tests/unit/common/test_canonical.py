"""Canonical JSON: one form, strict reading."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import canonical
from common.errors import ParcelError

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=8)
VALUES = st.recursive(
    st.integers(-canonical.MAX_INTEGER, canonical.MAX_INTEGER) | PRINTABLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PRINTABLE, inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_round_trip(value: object) -> None:
    assert canonical.decode(canonical.encode(value)) == value


@given(st.binary(max_size=40))
def test_any_bytes_are_read_exactly_or_refused(data: bytes) -> None:
    try:
        value = canonical.decode(data)
    except ParcelError:
        return
    assert canonical.encode(value) == data


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":1}',
        b'{"b":1,"a":1}',
        b'{"a": 1}',
        b'{"a":1}\n',
        b'{"a":1.0}',
        b'{"a":1e3}',
        b'{"a":null}',
        b'{"a":true}',
        b'{"a":NaN}',
        b'{"a":-0}',
        b'{"a":9007199254740992}',
        b'{"a":"\\u0041"}',
        b'{"a":"\\n"}',
        b'{"a":"\x7f"}',
        '{"a":"é"}'.encode(),
        b"[" * 100_000,
        b"[" * 20 + b"]" * 20,
        b"1" * 6000,
        b"",
        b'"' + b"a" * canonical.MAX_BYTES + b'"',
    ],
)
def test_refused(data: bytes) -> None:
    with pytest.raises(ParcelError):
        canonical.decode(data)


@pytest.mark.parametrize("value", [1.5, None, True, {1: 2}, "é", 2**53, (1,), b"x"])
def test_not_encodable(value: object) -> None:
    with pytest.raises(ParcelError):
        canonical.encode(value)
