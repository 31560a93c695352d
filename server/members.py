"""Who may exchange parcels with this server: `members.json`, and invitations with one-time tokens.

Both files are replaced whole under a lock, so that the command line may invite while the services run.
Of a token only its SHA-256 is kept. It works once; the same keys may ask again (a lost reply), other
keys may not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import FederationError, RefusedError
from common.files import sha256_bytes, write_atomic
from common.notes import Verifier
from common.parcels import SERVER
from common.roots import RetiredKeys, RootMember, log_verifiers
from common.rotation import ShoreKeys
from common.signing import PublicKey
from common.statements import NAME_PATTERN

TOKEN_LIFETIME_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Member:
    """One domain that has enrolled."""

    domain: str
    pseudonym: str
    identity_key: str  # Ed25519, hex
    log_key: str  # Ed25519, hex: signs the checkpoints of this domain's ledger
    certificate: str  # TLS client certificate, PEM
    certificate_fingerprint: str  # SHA-256 of its DER, hex
    node_id: str  # Flower SuperNode
    joined_s: int
    revoked_s: int = 0
    revoked_size: int = 0  # entries in the server's ledger at that moment
    retired: list[dict[str, Any]] = field(default_factory=list)  # `RetiredKeys`, the newest first

    @property
    def key(self) -> PublicKey:
        return PublicKey.from_hex(self.identity_key)

    def logs(self) -> list[Verifier]:
        """Who signs the checkpoints of its ledger, then who did before."""
        return log_verifiers(self.domain, self.in_root)

    @property
    def in_root(self) -> RootMember:
        """What of it stands in root.json."""
        return RootMember(
            domain=self.domain,
            pseudonym=self.pseudonym,
            identity_key=self.identity_key,
            log_key=self.log_key,
            certificate_fingerprint=self.certificate_fingerprint,
            revoked_s=self.revoked_s,
            revoked_size=self.revoked_size,
            retired=tuple(RetiredKeys(**keys) for keys in self.retired),
        )

    def retiring(self, size: int) -> list[dict[str, Any]]:
        """`retired` once its keys of today are: the server's ledger has `size` entries then."""
        return [{"identity_key": self.identity_key, "log_key": self.log_key, "size": size}, *self.retired]

    @property
    def is_revoked(self) -> bool:
        return self.revoked_s > 0


class _JsonFile:
    """A small JSON object that several processes change under one lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise FederationError(f"{self.path}: damaged", next_step="restore the file from a copy")
        return data

    def write(self, data: dict[str, Any]) -> None:
        write_atomic(self.path, json.dumps(data, indent=2, sort_keys=True).encode() + b"\n", mode=0o600)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Members:
    """The domains that have enrolled, read anew at every question (the file is small)."""

    def __init__(self, path: Path) -> None:
        self._file = _JsonFile(path)

    def all(self) -> list[Member]:
        """Every member, revoked ones included, by domain."""
        return [Member(**record) for _, record in sorted(self._file.read().items())]

    def get(self, domain: str) -> Member | None:
        """The member of this domain, or None."""
        record = self._file.read().get(domain)
        return Member(**record) if record else None

    def by_key_id(self, key_id: str) -> Member | None:
        """The member whose identity key has this `key_id`, or None."""
        return next((member for member in self.all() if member.key.key_id == key_id), None)

    def has_retired(self, key_id: str) -> bool:
        """Whether this was the identity key of a member that has another one now."""
        keys = [PublicKey.from_hex(old["identity_key"]) for member in self.all() for old in member.retired]
        return key_id in {key.key_id for key in keys}

    def keys(self) -> set[str]:
        """Every identity and log key that is or was a member's, hex."""
        parties = [keys for member in self.all() for keys in member.in_root.generations()]
        return {key for party in parties for key in (party.identity_key, party.log_key)}

    def put(self, member: Member) -> None:
        """Add or replace a member. Raises StorageError."""
        with self._file.locked():
            self._file.write({**self._file.read(), member.domain: asdict(member)})

    def rotate(self, keys: ShoreKeys, *, ledger_size: int) -> None:
        """From now on `keys` are this member's. Raises StorageError."""
        member = self.get(keys.shore)
        if member is not None:
            self.put(
                replace(
                    member,
                    identity_key=keys.identity_key,
                    log_key=keys.log_key,
                    retired=member.retiring(ledger_size),
                )
            )

    def revoke(self, domain: str, *, ledger_size: int) -> None:
        """Refuse everything from this domain from now on. What stands in the ledger before stays valid.

        Raises FederationError if it is unknown or revoked already.
        """
        member = self.get(domain)
        if member is None or member.is_revoked:
            raise FederationError(
                f"{domain!r} is not a member in good standing", next_step="see `isthmus server status`"
            )
        self.put(replace(member, revoked_s=int(time.time()), revoked_size=ledger_size))


class Invitations:
    """One-time tokens, by domain."""

    def __init__(self, path: Path) -> None:
        self._file = _JsonFile(path)

    def invite(self, domain: str, *, lifetime_s: int = TOKEN_LIFETIME_S) -> str:
        """A new token for `domain`; an earlier one stops working. Raises FederationError for a bad name."""
        if not re.fullmatch(NAME_PATTERN, domain) or domain == SERVER:
            raise FederationError(
                f"{domain[:40]!r} cannot name a domain",
                next_step=f"use lower-case letters, digits, '-' and '_'; {SERVER!r} is taken",
            )
        token = secrets.token_urlsafe(32)
        record = {
            "token_sha256": sha256_bytes(token.encode()),
            "expires_s": int(time.time()) + lifetime_s,
            "keys_sha256": "",
        }
        with self._file.locked():
            self._file.write({**self._file.read(), domain: record})
        return token

    def redeem(self, domain: str, token: str, keys_digest: str) -> None:
        """Use up the token for these keys. Raises RefusedError (`token`); the same keys may repeat it."""
        with self._file.locked():
            records = self._file.read()
            record = records.get(domain, {})
            known = hmac.compare_digest(record.get("token_sha256", ""), sha256_bytes(token.encode()))
            if not known or record["keys_sha256"] not in ("", keys_digest):
                raise RefusedError(
                    "the token is unknown, used, or for another domain",
                    reason="token",
                    next_step="ask the operator for a new invitation",
                )
            if record["expires_s"] < time.time():
                raise RefusedError(
                    "the token has expired",
                    reason="token",
                    next_step="ask the operator for a new invitation",
                )
            if record["keys_sha256"] != keys_digest:
                self._file.write({**records, domain: {**record, "keys_sha256": keys_digest}})
