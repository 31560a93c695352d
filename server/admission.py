"""Admission: every decision about what the server takes, in one place and without I/O.

`Admission` is given what is known (member, certificate, run, usage, clock) and what was read (envelope,
payload facts), and either returns or raises RefusedError with a stable `reason` and a text for the
sender. It opens no file and no socket; `server.intake` does that around it.

The rules, in order. Before a byte of payload (`check_header`):

 1. `malformed`       the envelope is exactly one of ours, and its header keeps the schema
 2. `unknown-sender`  it is signed by a member's identity key; `revoked` if that member was revoked, and
                      `rotated` if its owner has replaced the key
 3. `signature`       the signature verifies; nothing of the header is believed before this
 4. `sender`          the header's sender is that member, and the TLS certificate is that member's own
 5. `recipient`       it is addressed to this server
 6. `expired`         its clock fits ours within `SKEW_S`, and it has not expired
 7. `wrong-run`       the run is open, has this domain and this round; a revocation may come later, too
 8. `kind`            the run takes parcels of this kind
 9. `replay`          its nonce was not used by another envelope of this sender
10. `base-mismatch`   it is about the run's base model
11. `tensor-table`    a task vector names exactly the run's trainable tensors, with shape and dtype
12. `withdrawn`       a task vector is none that was withdrawn (`server.withdrawal`)
13. `quota`           size and count, with what is under way, are within the run's quota

After the payload (`check_payload`):

14. `payload-digest`  the bytes are those that the header names
15. `payload`         they are a strict file of the kind
16. `tensor-table`    each tensor is the one that the header names, to its digest
17. `not-finite`      no NaN, no infinity
18. `norm`            the L2 norm is above 0 and within the run's bound
19. `metrics`         only the run's metrics (`METRIC` or `LABEL/METRIC`), as finite numbers; a fitness is the
                      digest of candidates and a whole number of each
20. `sender`          a catalog is of the sender's own domain, and a revocation of a vector that it delivered

The header rules are applied twice, the second time under the store's lock right before acceptance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import ParcelError, RefusedError, SignatureError
from common.parcels import SERVER, SKEW_S, Header, Kind
from common.payloads import PayloadFacts, check_fitness, check_table, check_tensors
from common.signing import Sealed
from server.members import Member
from server.store import OpenRun

KEY_REPLACED = "signed by a key that its owner has replaced"


@dataclass(frozen=True)
class Known:
    """What the server knows when it decides about one header."""

    run: OpenRun | None
    nonces: Mapping[str, str]  # of this sender: nonce to the envelope's digest
    used_parcels: int
    used_bytes: int
    now_s: int
    withdrawn: bool = False  # whether this payload is a vector that was withdrawn


class Admission:
    """The rules above. Stateless: the same input gives the same verdict."""

    def read_header(self, envelope: bytes, member: Member | None) -> tuple[Header, Member]:
        """Rules 1 to 3: the header, and who signed it. Raises RefusedError."""
        try:
            sealed = Sealed.parse(envelope)
        except ParcelError as err:
            raise RefusedError(err.message, reason="malformed") from None
        if member is None or member.key.key_id != sealed.key_id:
            raise RefusedError("signed by a key that no member has", reason="unknown-sender")
        self.check_standing(member, sealed.key_id)
        try:
            return Header.open(sealed, member.key), member
        except SignatureError as err:
            raise RefusedError(err.message, reason="signature") from None
        except ParcelError as err:
            raise RefusedError(err.message, reason="malformed") from None

    def check_standing(self, member: Member | None, key_id: str) -> None:
        """Rule 2 by itself, for when time has passed since the header was read: is `key_id` good still?

        Raises RefusedError.
        """
        if member is None or member.is_revoked:
            raise RefusedError("this member was revoked", reason="revoked")
        if member.key.key_id != key_id:
            raise RefusedError(KEY_REPLACED, reason="rotated")

    def check_sender(self, header: Header, member: Member, peer_fingerprint: str) -> None:
        """Rule 4: header, key and TLS certificate (SHA-256 of its DER) are one member's."""
        if header.sender != member.domain or peer_fingerprint != member.certificate_fingerprint:
            raise RefusedError("header, key and TLS certificate must be one member's", reason="sender")

    def check_header(self, header: Header, digest: str, known: Known) -> None:
        """Rules 5 to 13, for a header that passed 1 to 4. Raises RefusedError."""
        run = known.run
        if header.recipient != SERVER:
            raise RefusedError(f"addressed to {header.recipient!r}, not to {SERVER!r}", reason="recipient")
        if header.created_s > known.now_s + SKEW_S or header.expires_s < known.now_s - SKEW_S:
            raise RefusedError("expired, or from the future: check the clock", reason="expired")
        late = run is not None and run.closed and header.kind is not Kind.REVOCATION
        if run is None or late or header.sender not in run.domains or header.round >= run.rounds:
            raise RefusedError(
                f"run {header.run!r} round {header.round} is not open here", reason="wrong-run"
            )
        if header.kind not in (*run.kinds, Kind.REVOCATION):
            raise RefusedError(f"this run takes no {header.kind}", reason="kind")
        if known.nonces.get(header.nonce, digest) != digest:
            raise RefusedError("another parcel used this nonce", reason="replay")
        if header.base_digest != run.base_digest:
            raise RefusedError(
                f"base model {header.base_digest[:12]}, this run's is {run.base_digest[:12]}",
                reason="base-mismatch",
            )
        if header.kind is Kind.TASK_VECTOR:
            check_table(header, run.tensors)
            if known.withdrawn:
                raise RefusedError("this vector was withdrawn: it is never merged again", reason="withdrawn")
        self._check_quota(header, run, known)

    def _check_quota(self, header: Header, run: OpenRun, known: Known) -> None:
        over = {
            "bytes in one payload": (header.payload_bytes, run.max_payload_bytes),
            "payload bytes in this run": (known.used_bytes + header.payload_bytes, run.quota_bytes),
            "parcels in this run": (known.used_parcels + 1, run.quota_parcels),
        }
        for what, (wanted, allowed) in over.items():
            if wanted > allowed:
                raise RefusedError(f"{wanted} {what}, at most {allowed} are allowed", reason="quota")

    def check_digest(self, header: Header, digest: str, size_bytes: int) -> None:
        """Rule 14: the bytes that arrived are those that were signed. Raises RefusedError."""
        if (digest, size_bytes) != (header.payload_digest, header.payload_bytes):
            raise RefusedError("the payload is not the one that the header names", reason="payload-digest")

    def check_payload(
        self, header: Header, facts: PayloadFacts, run: OpenRun, delivered: Mapping[str, str]
    ) -> None:
        """Rules 14 to 20, of what `common.payloads.inspect` read. Raises RefusedError.

        `delivered`: the sender's task vectors in this run, parcel to payload.
        """
        self.check_digest(header, facts.digest, facts.size_bytes)
        if header.kind.holds_tensors:
            check_tensors(header, facts, max_norm=run.max_norm)
        if header.kind is Kind.FITNESS:
            check_fitness(facts.values)
        if header.kind is Kind.METRICS:
            for name, value in facts.values.items():
                if name.rpartition("/")[2] not in run.metrics:
                    raise RefusedError(f"metric {name}: not one of this run's", reason="metrics")
                if isinstance(value, str):
                    raise RefusedError(f"metric {name}: not a number", reason="metrics")
        if header.kind is Kind.CATALOG and facts.catalog_domain != header.sender:
            raise RefusedError("the catalog is of another domain than its sender", reason="sender")
        if header.kind is Kind.REVOCATION:
            vector, payload = facts.values.get("vector"), facts.values.get("payload")
            if len(facts.values) != 2 or delivered.get(str(vector)) != payload:
                raise RefusedError("not a vector that this domain delivered in this run", reason="sender")
