"""An owner's home directory: who this domain is, which server it trusts, and where everything lies.

client.toml     what the owner decides: data, base model, approved app bundles
policy.toml     what may leave
keys/           identity and log (Ed25519), TLS keys and certificates, Flower node key; they never leave
ledger.jsonl    every crossing;  checkpoint  what it was at least, signed
journal.jsonl   what was done, so that nothing is done twice
wire.jsonl      what Flower said to the server: see clients.wire_gate
work/fits/      fine-tunings: checkpoints, vector, model
work/<run>/     evaluations and per-user results of one run;  work/status.json  what it is doing now
outbox/         parcels as they were sent
models/         installed universal models, `current` and the previous one; `own` and `personal` ones
flower/, logs/, empty/
"""

from __future__ import annotations

import tomllib
from functools import cached_property
from pathlib import Path

import tomli_w
from pydantic import Field

from clients.egress import EgressGate
from clients.policy import EgressPolicy, read_policy
from common.checkpoints import LedgerHome
from common.config import EMBEDDED_BASE, Frozen, load_toml
from common.errors import ConfigError
from common.files import write_atomic
from common.ledger import Journal
from common.notes import Verifier
from common.parcels import SERVER
from common.roots import log_origin
from common.signing import PublicKey, SigningKey
from common.tls import TlsFiles


class ServerAddress(Frozen):
    """The merge server as this owner knows it: addresses (host:port) and the pinned keys, hex."""

    name: str
    fleet: str
    exchange: str
    enrol: str
    public_key: str
    log_key: str
    retired_log_keys: tuple[str, ...] = ()


class ClientConfig(Frozen):
    """`client.toml`. Only the owner writes it; nothing that the server sends changes it."""

    domain: str
    pseudonym: str
    server: ServerAddress
    data: str = Field(description="the prepared domain folder (isthmus data prepare)")
    base: str = Field(EMBEDDED_BASE, description="the base model: embedded, or a folder")
    approved_fabs: tuple[str, ...] = ()
    supernode_port: int = 19094
    wire_port: int = Field(0, ge=0, le=65535, description="of the wire gate, on loopback; 0: any free one")
    max_training_minutes: float | None = Field(None, description="the owner's own limit for one fine-tuning")


class ClientHome(LedgerHome):
    """Paths and long-lived objects of one owner. Raises ConfigError: no home there, or no policy in it."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        config = self.path / "client.toml"
        if not config.exists():
            raise ConfigError(
                f"{path} is not an owner's home", next_step="isthmus client join KIT --home DIR"
            )
        self.config = load_toml(config, ClientConfig)
        self.policy: EgressPolicy = read_policy(self.path)

    @staticmethod
    def write_config(path: Path, config: ClientConfig) -> None:
        """Write `client.toml` into `path`."""
        text = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
        tomllib.loads(text)
        write_atomic(path / "client.toml", text.encode())

    @property
    def keys(self) -> Path:
        """Private keys; mode 0700."""
        return self.path / "keys"

    @property
    def status_path(self) -> Path:
        """What this owner is doing now, for whoever draws progress on this host."""
        return self.path / "work" / "status.json"

    @property
    def data_folder(self) -> Path:
        """The prepared domain folder."""
        return Path(self.config.data)

    @cached_property
    def server_key(self) -> PublicKey:
        """The merge server's pinned identity."""
        return PublicKey.from_hex(self.config.server.public_key)

    @cached_property
    def server_logs(self) -> list[Verifier]:
        """Who signs the checkpoints of the merge server's ledger, then who did before."""
        server = self.config.server
        keys = [PublicKey.from_hex(key) for key in (server.log_key, *server.retired_log_keys)]
        return [Verifier(log_origin(SERVER, key), key) for key in keys]

    @property
    def shore(self) -> str:
        """The name of this shore in ledgers and checkpoints."""
        return self.config.domain

    @cached_property
    def journal(self) -> Journal:
        """What was asked, done and receipted."""
        return Journal(self.path / "journal.jsonl")

    def is_withdrawn(self, digest: str) -> bool:
        """Whether a revocation named this vector (its payload's digest) or model."""
        return self.journal.get(f"withdrawn/{digest}") is not None

    @cached_property
    def tls(self) -> TlsFiles:
        """CA certificate, own certificate and key for the data channel."""
        return TlsFiles(self.keys / "ca.crt", self.keys / "tls.crt", self.keys / "tls.key")

    @cached_property
    def gate(self) -> EgressGate:
        """The one way out; it alone holds the identity key."""
        key = SigningKey.load(self.keys / "identity.key")
        return EgressGate(
            self.policy,
            key,
            self.ledger,
            self.journal,
            self.path / "outbox",
            sender=self.config.domain,
        )

    @property
    def fits(self) -> Path:
        """Fine-tunings by configuration, base and data; a new run of the same ones does not train again."""
        return self.path / "work" / "fits"

    def work(self, run: str) -> Path:
        """The working folder of one run."""
        folder = self.path / "work" / run
        folder.mkdir(parents=True, exist_ok=True)
        return folder
