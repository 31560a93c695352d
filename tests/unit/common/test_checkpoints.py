"""A ledger beside its signed checkpoint: it may grow, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.checkpoints import check_against, keep_checkpoint
from common.errors import LedgerError
from common.ledger import Crossing, Ledger
from common.notes import Signer
from common.signing import SigningKey

SIGNER = Signer("isthmus/toys/1", SigningKey(bytes(32)))


def _ledger(path: Path, entries: int) -> Ledger:
    ledger = Ledger(path)
    for number in range(len(ledger), entries):
        ledger.record(
            Crossing("out", "data", "parcel", f"{number:064x}", 1, "server", "catalog", "demo", "", 1)
        )
    return ledger


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    keep_checkpoint(_ledger(tmp_path / "ledger.jsonl", 5), SIGNER, tmp_path / "checkpoint")
    return tmp_path


def test_a_ledger_may_grow(kept: Path) -> None:
    ledger = _ledger(kept / "ledger.jsonl", 9)
    check_against(ledger, kept / "checkpoint", SIGNER)
    keep_checkpoint(ledger, SIGNER, kept / "checkpoint")
    check_against(Ledger(kept / "ledger.jsonl"), kept / "checkpoint", SIGNER)


def test_what_was_signed_cannot_go(kept: Path) -> None:
    path = kept / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    with pytest.raises(LedgerError, match=r"4 entries, and 5 were signed"):
        check_against(Ledger(path), kept / "checkpoint", SIGNER)


def test_a_line_cut_short_by_a_crash_is_no_loss_of_what_was_signed(kept: Path) -> None:
    path = kept / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'{"body":{"chan')
    check_against(Ledger(path), kept / "checkpoint", SIGNER)


def test_every_flipped_bit_and_every_cut_is_refused_at_start(kept: Path) -> None:
    path = kept / "ledger.jsonl"
    content = path.read_bytes()
    flips = [bytes([content[place] ^ 1 << place % 8]) for place in range(len(content))]
    damaged = [content[:place] + flips[place] + content[place + 1 :] for place in range(0, len(content), 5)]
    damaged += [content[:-1] + flips[-1]]
    damaged += [content[:end] for end in range(0, len(content), 11)]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(LedgerError, match=r"line \d|were signed"):
            check_against(Ledger(path), kept / "checkpoint", SIGNER)


def test_another_ledger_is_refused(kept: Path, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other.jsonl")
    for number in range(6):
        other.append({"number": number})
    with pytest.raises(LedgerError, match="first 5 entries"):
        check_against(other, kept / "checkpoint", SIGNER)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:-3], lambda b: b"\xff" + b, lambda b: b.replace(b"\n5\n", b"\n4\n")],
)
def test_a_damaged_checkpoint_is_named(kept: Path, damage: Callable[[bytes], bytes]) -> None:
    path = kept / "checkpoint"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LedgerError, match="not a checkpoint that this home signed"):
        check_against(Ledger(kept / "ledger.jsonl"), path, SIGNER)


def test_another_key_did_not_sign_it(kept: Path) -> None:
    stranger = Signer(SIGNER.name, SigningKey(b"x" * 32))
    with pytest.raises(LedgerError, match="not a checkpoint"):
        check_against(Ledger(kept / "ledger.jsonl"), kept / "checkpoint", stranger)


def test_a_checkpoint_may_be_newer_than_what_was_read(kept: Path) -> None:
    read_before = Ledger(kept / "ledger.jsonl")
    keep_checkpoint(_ledger(kept / "ledger.jsonl", 9), SIGNER, kept / "checkpoint")  # another process
    check_against(read_before, kept / "checkpoint", SIGNER)
