"""What a `revocation` parcel says: which task vector its owner withdrew, and which models hold it.

The payload is a flat JSON object of digests, in the one form of `common.payloads`.

    >>> said = Revocation("a" * 64, "b" * 64, ("c" * 64,))
    >>> Revocation.decode(said.encode()) == said
    True
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.errors import ParcelError
from common.payloads import decode_values, encode_values
from common.statements import DIGEST_PATTERN


@dataclass(frozen=True)
class Revocation:
    """`vector` is the digest of the task vector's parcel, `payload` that of its file; `models` are the
    digests of the universal models that were merged from it."""

    vector: str
    payload: str
    models: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The payload file. Raises ParcelError when a digest is none."""
        models = {f"model-{number}": digest for number, digest in enumerate(self.models)}
        data = encode_values({"vector": self.vector, "payload": self.payload, **models})
        self.decode(data)
        return data

    @classmethod
    def decode(cls, data: bytes) -> Revocation:
        """Read a payload strictly. Raises ParcelError."""
        values = decode_values(data)
        digests = {name: str(value) for name, value in values.items()}
        models = [f"model-{number}" for number in range(len(digests) - 2)]
        if set(digests) != {"vector", "payload", *models}:
            raise ParcelError("a revocation names a vector, its payload and models, and nothing else")
        if not all(re.fullmatch(DIGEST_PATTERN, digest) for digest in digests.values()):
            raise ParcelError("a revocation holds digests only")
        return cls(digests["vector"], digests["payload"], tuple(digests[name] for name in models))
