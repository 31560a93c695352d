"""Enrolment: an invited domain turns a one-time token into a certificate and a membership.

All private keys stay with the owner: it sends three public keys and proves that it holds the identity
key by signing the request. Retrying the same request gives the same answer; the token is worthless to
anyone else from its first use on.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from common.errors import RefusedError
from common.files import sha256_bytes
from common.signing import PublicKey
from common.tls import CertificateAuthority, certificate_fingerprint, sign_csr
from common.wire.enrolment import EnrolmentFacts
from server.members import Invitations, Member, Members

RegisterNode = Callable[[str, bytes], str]
"""(domain, SuperNode public key in OpenSSH format) -> node id. Must be idempotent: it may be repeated."""


class Enroller:
    """Decides about enrolments and writes the membership."""

    def __init__(
        self,
        members: Members,
        invitations: Invitations,
        ca: CertificateAuthority,
        server_key: PublicKey,
        register_node: RegisterNode,
    ) -> None:
        self._members = members
        self._invitations = invitations
        self._ca = ca
        self.server_key = server_key
        self._register_node = register_node

    def enrol(self, facts: EnrolmentFacts, proof: bytes) -> Member:
        """Make a member of the holder of these keys.

        Raises SignatureError (proof of possession), RefusedError (`token`, `already-member`), ParcelError
        (malformed key or request), FederationError (Flower does not take the node).
        """
        key = PublicKey.from_hex(facts.identity_key)
        key.verify(proof, facts.signed_bytes())
        log_key = PublicKey.from_hex(facts.log_key)
        keys_digest = sha256_bytes(key.raw + log_key.raw + facts.node_key)
        self._invitations.redeem(facts.domain, facts.token, keys_digest)
        known = self._members.get(facts.domain)
        if known is not None and not known.is_revoked:
            if known.identity_key == facts.identity_key:
                return known
            raise RefusedError("this domain has enrolled with other keys", reason="already-member")
        taken = {self.server_key.hex, *self._members.keys()}
        if facts.identity_key in taken or facts.log_key in {facts.identity_key, *taken}:
            raise RefusedError("a key is or was another key of somebody's", reason="already-member")
        certificate = sign_csr(self._ca, facts.tls_csr, facts.domain)
        member = Member(
            domain=facts.domain,
            pseudonym=f"domain-{secrets.token_hex(3)}",
            identity_key=facts.identity_key,
            log_key=facts.log_key,
            certificate=certificate.decode(),
            certificate_fingerprint=certificate_fingerprint(certificate),
            node_id=self._register_node(facts.domain, facts.node_key),
            joined_s=int(time.time()),
            retired=[] if known is None else known.retiring(known.revoked_size),
        )
        self._members.put(member)
        return member
