"""Keys, and envelopes in which no byte can be changed or added."""

import base64
import json
import stat
from pathlib import Path

import pytest

from common import canonical
from common.errors import ConfigError, ParcelError, SignatureError
from common.signing import PublicKey, Sealed, SigningKey, pae, seal

KEY = SigningKey(bytes(range(32)))
STATEMENT = {"kind": "catalog", "n": 3}


def test_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity.key"
    key = SigningKey.generate(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).public == key.public == SigningKey.ensure(path).public
    with pytest.raises(ConfigError, match="exists already"):
        SigningKey.generate(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read"):
        SigningKey.load(path)
    assert [found.name for found in path.parent.iterdir()] == ["identity.key"]


def test_public_key_has_one_text_form() -> None:
    assert PublicKey.from_hex(KEY.public.hex) == KEY.public
    assert len(KEY.public.fingerprint.split()) == 8
    for text in (KEY.public.hex.upper(), KEY.public.hex[:-2], KEY.public.hex + " ", "zz" * 32):
        with pytest.raises(ParcelError):
            PublicKey.from_hex(text)


def test_seal_and_open() -> None:
    envelope = seal(STATEMENT, KEY)
    assert Sealed.parse(envelope).open(KEY.public) == STATEMENT
    assert seal(STATEMENT, KEY) == envelope
    with pytest.raises(SignatureError):
        Sealed.parse(envelope).open(SigningKey(bytes(32)).public)
    with pytest.raises(ParcelError):
        Sealed.parse(envelope).open(KEY.public, payload_type="application/other")


def test_every_single_byte_change_is_refused() -> None:
    envelope = seal(STATEMENT, KEY)
    for position in range(len(envelope)):
        for flip in (0x01, 0x20, 0x80, 0xFF):
            changed = bytearray(envelope)
            changed[position] ^= flip
            with pytest.raises(ParcelError):
                Sealed.parse(bytes(changed)).open(KEY.public)


def _smuggled() -> dict[str, bytes]:
    good = json.loads(seal(STATEMENT, KEY))
    signature = good["signatures"][0]
    urlsafe = base64.urlsafe_b64encode(b"\xfb\xff" * 8).decode()
    payload = canonical.encode(STATEMENT)
    loose = json.dumps(STATEMENT).encode()
    loose_signature = KEY.sign(pae(good["payloadType"], loose))
    cases = {
        "field": {**good, "extra": "x"},
        "signature field": {**good, "signatures": [{**signature, "extra": "x"}]},
        "two signatures": {**good, "signatures": [signature, signature]},
        "no signature": {**good, "signatures": []},
        "url-safe base64": {**good, "signatures": [{**signature, "sig": urlsafe}]},
        "spaced base64": {**good, "payload": good["payload"][:4] + " " + good["payload"][4:]},
        "loose bits in base64": {**good, "payload": base64.b64encode(payload + b"x").decode()[:-2] + "h="},
        "other key id": {**good, "signatures": [{**signature, "keyid": "0" * 64}]},
        "number for text": {**good, "payloadType": 1},
        "payload not canonical": {
            **good,
            "payload": base64.b64encode(loose).decode(),
            "signatures": [{**signature, "sig": base64.b64encode(loose_signature).decode()}],
        },
    }
    made = {name: canonical.encode(case) for name, case in cases.items()}
    made["white space"] = json.dumps(good).encode()
    made["trailing byte"] = seal(STATEMENT, KEY) + b"\n"
    return made


@pytest.mark.parametrize("case", sorted(_smuggled()))
def test_nothing_rides_along(case: str) -> None:
    with pytest.raises(ParcelError):
        Sealed.parse(_smuggled()[case]).open(KEY.public)


def test_other_dsse_implementations_accept_ours() -> None:
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    data = json.loads(seal(STATEMENT, KEY))
    envelope = dsse.Envelope.from_dict(data)
    scheme = {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": KEY.public.hex}}
    key = signer.Key.from_dict(KEY.public.key_id, scheme)
    assert envelope.pae() == pae(data["payloadType"], base64.b64decode(data["payload"]))
    assert envelope.verify([key], 1)
