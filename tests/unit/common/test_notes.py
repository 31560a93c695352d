"""Signed notes, checkpoints and cosignatures: published answers, and strictness."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ProofError, SignatureError
from common.merkle import EMPTY_ROOT
from common.notes import COSIGNATURE, Checkpoint, Note, Signer, Verifier
from common.signing import SigningKey

# The example key, text and note of golang.org/x/mod/sumdb/note.
VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
NOTE = (
    TEXT + "\n\N{EM DASH} PeterNeumann "
    "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
# The example of c2sp.org/tlog-cosignature (its log's key is not published, its form is).
SOFA = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "\N{EM DASH} example.com/behind-the-sofa "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
    "\N{EM DASH} witness.example.com/w1 "
    "jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)
LOG = Signer("isthmus.example/log", SigningKey(bytes([7]) * 32))
WITNESS = Signer("witness.example/w1", SigningKey(bytes([8]) * 32))
LOG_KEY, WITNESS_KEY = Verifier(LOG.name, LOG.key.public), Verifier(WITNESS.name, WITNESS.key.public)


def _note(size: int = 5) -> Note:
    return LOG.sign(Checkpoint(LOG.name, size, b"r" * 32).text())


def test_the_published_note_verifies_and_is_what_we_sign() -> None:
    verifier = Verifier.from_vkey(VKEY)
    Note.parse(NOTE).verify(verifier)
    assert verifier.vkey() == VKEY
    assert str(Signer("PeterNeumann", SigningKey(SEED)).sign(TEXT)) == NOTE


def test_the_published_cosigned_checkpoint_is_read_and_written_alike() -> None:
    note = Note.parse(SOFA)
    assert str(note) == SOFA
    checkpoint = Checkpoint.read(note.text)
    assert (checkpoint.origin, checkpoint.size) == ("example.com/behind-the-sofa", 20852163)
    assert checkpoint.text() == note.text
    assert [len(raw) for _, raw in note.signatures] == [4 + 64, 4 + 8 + 64]
    assert int.from_bytes(note.signatures[1][1][4:12], "big") == 1679315147


def test_the_published_cosignature_message() -> None:
    note = LOG.sign(Note.parse(SOFA).text).with_cosignature(WITNESS, time_s=1679315147)
    message = (
        b"cosignature/v1\ntime 1679315147\nexample.com/behind-the-sofa\n20852163\n"
        b"CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    )
    WITNESS.key.public.verify(note.signatures[1][1][12:], message)


@pytest.mark.parametrize("end", range(len(VKEY)))
def test_part_of_a_verifier_key_is_none(end: int) -> None:
    with pytest.raises(ProofError):
        Verifier.from_vkey(VKEY[:end])


@pytest.mark.parametrize(
    "vkey",
    [
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",  # too long
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",  # unknown type
        VKEY.replace("c74f20a3", "c74f20a4"),
        VKEY.replace("PeterNeumann", "Peter Neumann"),
    ],
)
def test_mangled_verifier_keys(vkey: str) -> None:
    with pytest.raises(ProofError):
        Verifier.from_vkey(vkey)


def test_a_verifier_key_is_of_one_type() -> None:
    vkey = WITNESS_KEY.vkey(COSIGNATURE)
    assert Verifier.from_vkey(vkey, COSIGNATURE) == WITNESS_KEY
    with pytest.raises(ProofError):
        Verifier.from_vkey(vkey)


def test_cosigning() -> None:
    note = _note().with_cosignature(WITNESS, time_s=100)
    assert note.cosigned_by(WITNESS_KEY) == 100
    note.verify(LOG_KEY)
    again = note.with_cosignature(WITNESS, time_s=200)
    assert again.cosigned_by(WITNESS_KEY) == 200
    assert len(again.signatures) == 2


def test_signatures_and_cosignatures_are_not_each_other() -> None:
    note = _note().with_cosignature(WITNESS, time_s=100)
    with pytest.raises(SignatureError, match="not signed"):
        note.verify(WITNESS_KEY)
    with pytest.raises(SignatureError, match="not cosigned"):
        note.cosigned_by(LOG_KEY)


def test_a_cosignature_is_for_one_text_and_one_time() -> None:
    note = _note(5).with_cosignature(WITNESS, time_s=100)
    moved = Note(_note(6).text, note.signatures)
    with pytest.raises(SignatureError):
        moved.cosigned_by(WITNESS_KEY)
    name, raw = note.signatures[1]
    later = Note(note.text, (note.signatures[0], (name, raw[:4] + (101).to_bytes(8, "big") + raw[12:])))
    with pytest.raises(SignatureError):
        later.cosigned_by(WITNESS_KEY)


def test_another_key_of_the_same_name_is_not_the_key() -> None:
    other = Verifier(LOG.name, SigningKey(bytes([9]) * 32).public)
    with pytest.raises(SignatureError):
        _note().verify(other)


def test_a_checkpoint_speaks_of_its_own_log() -> None:
    assert Checkpoint.open(str(_note()), LOG_KEY).size == 5
    foreign = LOG.sign(Checkpoint("another/log", 5, b"r" * 32).text())
    with pytest.raises(ProofError, match="another/log"):
        Checkpoint.open(str(foreign), LOG_KEY)


ROOT = base64.b64encode(b"r" * 32).decode()


@pytest.mark.parametrize(
    "text",
    [
        f"log\n05\n{ROOT}\n",
        f"log\n-1\n{ROOT}\n",
        f"log\n+1\n{ROOT}\n",
        f"log\n1 \n{ROOT}\n",
        f"log\n1\n{ROOT}\nextension\n",
        f"\n1\n{ROOT}\n",
        f"log\n1\n{ROOT[:-4]}\n",
        f"log\n1\n{ROOT.replace('=', '')}\n",
        f"log\n1\n{ROOT}",
        f"log\n0\n{ROOT}\n",
        "log\n1\n",
        "",
    ],
)
def test_what_is_no_checkpoint(text: str) -> None:
    with pytest.raises(ProofError):
        Checkpoint.read(text)


def test_the_empty_log_has_a_checkpoint() -> None:
    text = Checkpoint("log", 0, EMPTY_ROOT).text()
    assert Checkpoint.read(text).text() == text


@pytest.mark.parametrize(
    "note",
    [
        "",
        "\n",
        TEXT,
        TEXT + "\n",
        NOTE[:-1],
        NOTE + "\n",
        NOTE.replace("\N{EM DASH} ", "- "),
        NOTE.replace("PeterNeumann ", "PeterNeumann  "),
        NOTE.replace("PeterNeumann ", "Peter+Neumann "),
        NOTE.replace("you", "y\tou", 1),
        NOTE.replace("you", "y\ud800ou", 1),
        NOTE.replace("JnAM=", "JnAN="),
        NOTE.replace("x08go/Z", "x08go_Z"),
        TEXT + "\n" + ("\N{EM DASH} a AAAAAAAA\n" * 17),
        "x" * 70_000 + "\n\n\N{EM DASH} a AAAAAAAA\n",
    ],
)
def test_what_is_no_note(note: str) -> None:
    with pytest.raises(ProofError):
        Note.parse(note)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SOFA) - 1), st.characters(codec="utf-8"))
def test_no_changed_character_is_accepted(place: int, char: str) -> None:
    note = str(_note().with_cosignature(WITNESS, time_s=100))
    place %= len(note)
    changed = note[:place] + char + note[place + 1 :]
    if changed == note:
        return
    with pytest.raises((ProofError, SignatureError)):
        parsed = Note.parse(changed)
        Checkpoint.open(changed, LOG_KEY)
        parsed.cosigned_by(WITNESS_KEY)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (Note.parse, Checkpoint.read, Verifier.from_vkey):
        try:
            read(text)
        except ProofError:
            continue
