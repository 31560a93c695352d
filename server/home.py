"""The merge server's home directory: its addresses, keys, members, parcels and runs.

server.toml      name, hosts, ports
keys/            CA, TLS certificate, identity, log and root key (Ed25519), Flower's shared secret
root.json        whose keys count, signed by the root key (`common.roots`)
retired.json     keys that this server had before
members.json     who joined;  invites/  digests of one-time tokens
ledger.jsonl     every crossing;  checkpoint  what it was at least, signed
store/           admitted and published parcels
runs/<id>/       see server.runs
flower/, logs/, empty/, status
"""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import Field

from common import tls
from common.checkpoints import LedgerHome
from common.config import Frozen, load_toml
from common.errors import ConfigError, FederationError
from common.files import sha256_bytes, write_atomic
from common.ledger import Crossing
from common.parcels import SERVER
from common.roots import RetiredKeys
from common.signing import SigningKey
from server.members import Invitations, Member, Members
from server.runs import Runs
from server.store import ParcelStore

HOME_VARIABLE = "ISTHMUS_SERVER_HOME"


class Ports(Frozen):
    """Three public ports and the SuperLink's, which listens on loopback only."""

    fleet: int = Field(9101, ge=1, le=65535)
    exchange: int = Field(9102, ge=1, le=65535)
    enrol: int = Field(9103, ge=1, le=65535)
    superlink: int = Field(9104, ge=1, le=65535)


class ServerConfig(Frozen):
    """`server.toml`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    hosts: tuple[str, ...] = Field(
        ("127.0.0.1",), min_length=1, description="names and addresses domains use"
    )
    bind: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    ports: Ports = Ports()


class ServerHome(LedgerHome):
    """Paths and long-lived objects of one merge server. Raises ConfigError when `path` is not a home."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        config = self.path / "server.toml"
        if not config.exists():
            raise ConfigError(f"{path} is not a server's home", next_step="isthmus server init --home DIR")
        self.config = load_toml(config, ServerConfig)

    @classmethod
    def from_environment(cls) -> ServerHome:
        """The home that `isthmus server up` works for."""
        return cls(Path(os.environ[HOME_VARIABLE]))

    @classmethod
    def create(cls, path: Path, config: ServerConfig) -> ServerHome:
        """Make keys and certificates where they are used. Raises ConfigError if there is a home already."""
        if (path / "server.toml").exists():
            raise ConfigError(f"{path} is a server's home already", next_step="isthmus server up --home DIR")
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        keys = path / "keys"
        keys.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority = tls.create_ca(keys)
        hosts = list(dict.fromkeys((*config.hosts, "127.0.0.1", "localhost")))
        tls.issue_server_certificate(authority, keys, hosts, name="tls")
        for name in ("identity", "log", "root"):
            SigningKey.generate(keys / f"{name}.key")
        write_atomic(keys / "superexec.secret", secrets.token_bytes(32), mode=0o600)
        text = tomli_w.dumps(config.model_dump(mode="json"))
        tomllib.loads(text)
        write_atomic(path / "server.toml", text.encode())
        return cls(path)

    @property
    def keys(self) -> Path:
        """Private keys and certificates; mode 0700."""
        return self.path / "keys"

    @cached_property
    def identity(self) -> SigningKey:
        """Signs orders, receipts and published parcels."""
        return SigningKey.load(self.keys / "identity.key")

    @property
    def shore(self) -> str:
        """The name of this shore in ledgers and checkpoints."""
        return SERVER

    @property
    def retired_keys(self) -> tuple[RetiredKeys, ...]:
        """The keys that this server had before, the newest first."""
        path = self.path / "retired.json"
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return tuple(RetiredKeys(**record) for record in records)

    def retire_keys(self, size: int) -> None:
        """Note today's keys as retired when the ledger had `size` entries; once. Raises StorageError."""
        keys = RetiredKeys(
            identity_key=self.identity.public.hex, log_key=self.log_signer.key.public.hex, size=size
        )
        known = self.retired_keys
        if keys.identity_key not in {old.identity_key for old in known}:
            records = [old.model_dump() for old in (keys, *known)]
            write_atomic(self.path / "retired.json", json.dumps(records, indent=1).encode() + b"\n")

    @cached_property
    def store(self) -> ParcelStore:
        """Admitted and published parcels."""
        return ParcelStore(self.path / "store")

    @cached_property
    def members(self) -> Members:
        """Who joined."""
        return Members(self.path / "members.json")

    @cached_property
    def invitations(self) -> Invitations:
        """One-time tokens that are out."""
        return Invitations(self.path / "invitations.json")

    @cached_property
    def runs(self) -> Runs:
        """Every run."""
        return Runs(self.path / "runs")

    def log_message(self, direction: Literal["in", "out"], domain: str, run: str, content: bytes) -> None:
        """Record a control message before it is sent, or when it was read."""
        self.ledger.record(
            Crossing(
                direction,
                "control",
                "message",
                sha256_bytes(content),
                len(content),
                domain,
                "message",
                run,
                "accepted",
            )
        )

    def member(self, domain: str) -> Member:
        """The member called `domain`. Raises FederationError when it never joined."""
        member = self.members.get(domain)
        if member is None:
            raise FederationError(f"{domain!r} is not a member", next_step="see `isthmus server status`")
        return member

    def pseudonym(self, domain: str) -> str:
        """The name under which `domain` appears in what is published."""
        return self.member(domain).pseudonym

    def address(self, service: str) -> str:
        """host:port of `fleet`, `exchange` or `enrol` as domains reach it."""
        return f"{self.config.hosts[0]}:{getattr(self.config.ports, service)}"
