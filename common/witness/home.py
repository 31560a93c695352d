"""The witness's home directory: keys, the root file that it trusts, and one tree head a log.

witness.toml    its name, and where it listens
keys/           witness.key (Ed25519) and its TLS certificate
root.json       whose logs it cosigns
cosigned/       the newest checkpoint of each log, cosigned
"""

from __future__ import annotations

import threading
import time
import tomllib
from functools import cached_property
from pathlib import Path

import tomli_w
from pydantic import Field

from common import tls
from common.config import Frozen, load_toml
from common.cosigning import Cosigner
from common.errors import ConfigError, RefusedError
from common.files import write_atomic
from common.notes import Note, Signer, Verifier
from common.roots import SignedRoot, log_verifiers
from common.signing import SigningKey
from common.statements import WITNESS_PATTERN
from common.tls import TlsFiles
from common.witness.card import WitnessCard


class WitnessConfig(Frozen):
    """`witness.toml`."""

    name: str = Field(pattern=WITNESS_PATTERN)
    host: str = Field("127.0.0.1", description="the name or address by which it is reached")
    bind: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(9105, ge=1, le=65535)


class WitnessHome:
    """Paths and long-lived objects of a witness. Raises ConfigError when `path` is not a home."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        config = self.path / "witness.toml"
        if not config.exists():
            raise ConfigError(f"{path} is not a witness's home", next_step="isthmus witness init --home DIR")
        self.config = load_toml(config, WitnessConfig)
        self._guard = threading.Lock()

    @classmethod
    def create(cls, path: Path, config: WitnessConfig, root: SignedRoot) -> WitnessHome:
        """Make keys, and trust `root` from now on. Raises ConfigError if there is a home already."""
        if (path / "witness.toml").exists():
            raise ConfigError(f"{path} is a witness's home already", next_step="isthmus witness up")
        keys = path / "keys"
        keys.mkdir(parents=True, exist_ok=True, mode=0o700)
        SigningKey.ensure(keys / "witness.key")
        authority = tls.create_ca(keys)
        hosts = list(dict.fromkeys((config.host, "127.0.0.1", "localhost")))
        tls.issue_server_certificate(authority, keys, hosts, name="tls")
        root.save(path / "root.json")
        text = tomli_w.dumps(config.model_dump(mode="json"))
        tomllib.loads(text)
        write_atomic(path / "witness.toml", text.encode())
        return cls(path)

    @cached_property
    def tls(self) -> TlsFiles:
        """What it shows to callers; they bring no certificate."""
        keys = self.path / "keys"
        return TlsFiles(keys / "ca.crt", keys / "tls.crt", keys / "tls.key")

    @cached_property
    def cosigner(self) -> Cosigner:
        """Its key and the tree heads."""
        key = SigningKey.load(self.path / "keys" / "witness.key")
        return Cosigner(self.path / "cosigned", Signer(self.config.name, key))

    @property
    def card(self) -> WitnessCard:
        """What the operator and the owners need."""
        return WitnessCard(
            name=self.config.name,
            key=self.cosigner.signer.key.public.hex,
            address=f"{self.config.host}:{self.config.port}",
            ca_certificate=self.tls.ca.read_text(encoding="ascii"),
        )

    @property
    def root(self) -> SignedRoot:
        """The root file that it trusts. Raises ParcelError when it is damaged."""
        return SignedRoot.load(self.path / "root.json")

    def update_root(self, data: bytes) -> int:
        """Trust the next version, or (empty) none; the version that is trusted then.

        Raises ParcelError or SignatureError unless it follows the one that is trusted.
        """
        with self._guard:
            trusted = self.root
            if not data:
                return trusted.root.version
            signed = SignedRoot.parse(data)
            signed.verify_after(trusted.root, now_s=int(time.time()))
            signed.save(self.path / "root.json")
            return signed.root.version

    def find_log(self, origin: str) -> tuple[str, list[Verifier]]:
        """Whose log this is. Raises RefusedError (`unknown-log`) when it is nobody's in the root file."""
        for shore, party in self.root.root.parties().items():
            logs = log_verifiers(shore, party)
            if logs[0].name == origin:
                return shore, logs
        raise RefusedError("no log of this origin in the root file", reason="unknown-log")

    def notes(self) -> dict[str, Note]:
        """The newest cosigned checkpoint of each shore. Raises ProofError when one is damaged."""
        folder = self.path / "cosigned"
        return {path.name: Note.parse(path.read_text("utf-8")) for path in sorted(folder.glob("[!.]*"))}
