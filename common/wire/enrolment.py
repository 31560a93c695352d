"""The fields of an enrolment, and the bytes of them that the new identity key signs."""

from __future__ import annotations

from dataclasses import dataclass

from common import canonical
from common.errors import ParcelError
from common.signing import pae

REQUEST_TYPE = "application/vnd.isthmus.enrolment.v1+json"


@dataclass(frozen=True)
class EnrolmentFacts:
    """What an owner says to join; see `EnrolRequest` in `proto/`."""

    domain: str
    token: str
    identity_key: str  # Ed25519, hex
    log_key: str  # Ed25519, hex
    tls_csr: bytes  # PEM
    node_key: bytes  # OpenSSH

    def signed_bytes(self) -> bytes:
        """DSSE pre-authentication encoding of the fields. Raises ParcelError when one is not plain ASCII."""
        try:
            fields = {
                "domain": self.domain,
                "token": self.token,
                "identity_key": self.identity_key,
                "log_key": self.log_key,
                "tls_csr": self.tls_csr.hex(),
                "node_key": self.node_key.hex(),
            }
            return pae(REQUEST_TYPE, canonical.encode(fields, max_bytes=64 << 10))
        except ParcelError as err:
            raise ParcelError(f"enrolment: {err.message}") from None
