"""Every error that Isthmus raises on purpose.

An error says what was wrong, what was expected and got, where (file, line, tensor), and the next
step. Its text never contains private data. Each also inherits the standard error it replaces, so
`except ValueError` keeps working. `code` is the stable name that crosses the wire instead of the text.

    IsthmusError
     +-- ConfigError(ValueError)          a configuration file or value is wrong
     +-- DataError(ValueError)            a data file, line or item is wrong
     +-- ModelError(ValueError)           a model folder is missing, incomplete or of another base
     |    +-- BaseMismatchError           the base model's digest differs from the run's
     +-- VectorError(ValueError)          a tensor is missing, extra, misshapen or not finite
     +-- ParcelError(ValueError)          a parcel is malformed, forged, replayed or out of place
     |    +-- SignatureError
     |    +-- ReplayError
     |    +-- RefusedError                the other shore refused it; carries the reason code
     +-- GateError(PermissionError)       the egress gate refused to let something leave
     |    +-- PolicyError                 the owner's policy forbids what a run asks for
     +-- LedgerError(RuntimeError)        a ledger or journal cannot be trusted or written
     |    +-- ProofError                  a Merkle proof or a checkpoint does not verify
     +-- StorageError(OSError)            the disk is full or the store cannot be written
     +-- TransportError(ConnectionError)  the link broke; trying again later may work
     +-- FederationError(RuntimeError)    processes, ports, membership, quorum
"""

from __future__ import annotations

from collections.abc import Iterable


def suggest(word: str, known: Iterable[str], *, otherwise: str = "known: {}") -> str:
    """The next step for an unknown `word`: the nearest of `known`, or all of them after `otherwise`."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else otherwise.format(", ".join(names))


class IsthmusError(Exception):
    """Base of all deliberate errors. `next_step` tells the reader what to do about it."""

    code = "error"

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.next_step}" if self.next_step else self.message


class ConfigError(IsthmusError, ValueError):
    """A configuration file, key or value is wrong."""

    code = "config"


class DataError(IsthmusError, ValueError):
    """A data file, line or item is wrong; the message names file and line, never a user."""

    code = "data"


class ModelError(IsthmusError, ValueError):
    """A model folder is missing, incomplete, or not an encoder that we can load."""

    code = "model"


class BaseMismatchError(ModelError):
    """The base model's digest differs from the one that the run names."""

    code = "base-mismatch"


class VectorError(IsthmusError, ValueError):
    """A tensor is missing, extra, of the wrong shape or dtype, or not finite; the message names it."""

    code = "vector"


class ParcelError(IsthmusError, ValueError):
    """A parcel's header or payload is malformed or out of place."""

    code = "parcel"


class SignatureError(ParcelError):
    """A signature does not verify under the expected key."""

    code = "signature"


class ReplayError(ParcelError):
    """A parcel with this nonce was seen before."""

    code = "replay"


class RefusedError(ParcelError):
    """The other shore refused the parcel; `reason` is its stable code."""

    code = "refused"

    def __init__(self, message: str, *, reason: str, next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.reason = reason


class GateError(IsthmusError, PermissionError):
    """The egress gate refused to let something leave the owner."""

    code = "gate"


class PolicyError(GateError):
    """The owner's policy forbids what a run asks for."""

    code = "policy"


class LedgerError(IsthmusError, RuntimeError):
    """A ledger or journal is damaged or cannot be written."""

    code = "ledger"


class ProofError(LedgerError):
    """A Merkle proof, a checkpoint or a cosignature does not verify."""

    code = "proof"


class StorageError(IsthmusError, OSError):
    """The disk is full or the object store cannot be written."""

    code = "storage"


class TransportError(IsthmusError, ConnectionError):
    """The link to the other shore broke; the same call can be made again."""

    code = "transport"


class FederationError(IsthmusError, RuntimeError):
    """Processes, ports, membership or quorum are not as they must be."""

    code = "federation"
