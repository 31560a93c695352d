"""Asking for cosignatures: how a shore submits the checkpoint of its own ledger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from common.checkpoints import LedgerHome, sign_checkpoint
from common.errors import IsthmusError, LedgerError, ProofError, TransportError
from common.files import write_atomic
from common.ledger import Crossing
from common.merkle import HASH_BYTES
from common.notes import Checkpoint, Note, Verifier
from common.roots import SignedRoot
from common.wire import exchange_pb2 as pb
from common.wire import exchange_pb2_grpc as rpc
from common.wire.link import CALL_S, connect_to, raise_refused, translated
from common.witness.card import witnesses_of

log = logging.getLogger(__name__)
Release = Callable[[str, str, int], None]
"""(note, peer, bytes): record it and let it out, or raise."""


def submit(
    home: LedgerHome, channel: Any, by: Verifier, peer: str, release: Release, cosigned: str = ""
) -> Note:
    """The checkpoint of `home`'s ledger as it is now, cosigned by `by` and kept at home.

    `peer` names the cosigner in the ledger; `cosigned` is its own checkpoint with our cosignature, or empty.
    Raises LedgerError when it cosigned more than this ledger has, ProofError or SignatureError (not its
    cosignature), RefusedError, TransportError, and what `release` raises.
    """
    path = home.cosigned_path(peer)
    old_size = Checkpoint.read(Note.parse(path.read_text("utf-8")).text).size if path.exists() else 0
    for _ in range(2):
        with home.ledger.locked():
            note = str(sign_checkpoint(home.ledger, home.log_signer))
            size = len(home.ledger)
            if old_size > size:
                raise LedgerError(
                    f"{by.name} cosigned {old_size} entries of this ledger, and it has {size}",
                    next_step="restore the ledger from a copy: some of it is gone",
                )
            proof = home.ledger.consistency(old_size, size)
        sent = len(note.encode()) + len(cosigned.encode()) + HASH_BYTES * len(proof)
        release(note, peer, sent)
        request = pb.AddCheckpointRequest(old_size=old_size, proof=proof, note=note, cosigned=cosigned)
        try:
            reply = rpc.WitnessStub(channel).AddCheckpoint(request, timeout=CALL_S)
        except grpc.RpcError as err:
            raise translated(err) from None
        match reply.WhichOneof("outcome"):
            case "cosigned":
                answer = Crossing.of_checkpoint("in", peer, reply.cosigned, len(reply.cosigned.encode()))
                home.ledger.record(answer)
                found = Note.parse(reply.cosigned)
                found.cosigned_by(by)
                if Note.parse(note).text != found.text:
                    raise ProofError(f"{by.name} cosigned another checkpoint than ours")
                write_atomic(path, str(found).encode())
                return found
            case "known_size":
                old_size = reply.known_size
            case _ if reply.refused.reason == ProofError.code:
                raise LedgerError(
                    f"{by.name} saw another history of this ledger: its first {old_size} entries changed",
                    next_step="restore the ledger from a copy; it must never change",
                )
            case _:
                raise_refused(reply.refused)
    raise TransportError(f"{by.name} keeps naming another size", next_step="try again")


def ask_witnesses(home: LedgerHome, release: Release, roots: Sequence[SignedRoot] = ()) -> None:
    """Have every witness of `home` cosign its ledger; a witness without an answer of use is logged.

    `roots` are brought to a witness first that does not know them yet. Raises LedgerError when a witness
    cosigned another history of this ledger.
    """
    for card in witnesses_of(home.path):
        try:
            with connect_to(card.address, card.ca_certificate.encode()) as channel:
                _bring_up_to_date(channel, roots)
                submit(home, channel, card.in_root.verifier, card.in_root.peer, release)
        except IsthmusError as err:
            if isinstance(err, LedgerError) and not isinstance(err, ProofError):
                raise
            log.warning("witness %s did not cosign: %s", card.name, err.message)


def _bring_up_to_date(channel: Any, roots: Sequence[SignedRoot]) -> None:
    if not roots:
        return
    version = _update_root(channel, b"")
    for signed in roots:
        if signed.root.version == version + 1:
            version = _update_root(channel, signed.encode())


def _update_root(channel: Any, root: bytes) -> int:
    try:
        reply = rpc.WitnessStub(channel).UpdateRoot(pb.UpdateRootRequest(root=root), timeout=CALL_S)
    except grpc.RpcError as err:
        raise translated(err) from None
    if reply.WhichOneof("outcome") != "version":
        raise_refused(reply.refused)
    return int(reply.version)
