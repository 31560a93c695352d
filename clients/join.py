"""Joining a federation: keys are made here, three public keys go out, a certificate comes back."""

from __future__ import annotations

import secrets
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clients.data.domain import Domain
from clients.exchange_client import enrol
from clients.home import ClientConfig, ClientHome, ServerAddress
from clients.policy import POLICY, EgressPolicy, write_policy
from common.errors import ConfigError, SignatureError
from common.files import write_atomic
from common.kit import JoinKit
from common.models.base import resolve_base
from common.rotation import ShoreKeys
from common.signing import PublicKey, SigningKey
from common.tls import make_csr


def join(
    kit: JoinKit,
    path: Path,
    *,
    data: Path,
    base: str,
    supernode_port: int,
    policy: EgressPolicy | None = None,
) -> ClientHome:
    """Make an owner's home at `path` and enrol it. Safe to repeat after a broken link: keys are kept.

    Raises ConfigError (a home is there, or the data or base cannot be read), RefusedError (token),
    SignatureError (the kit's key and fingerprint disagree), TransportError.
    """
    if (path / "client.toml").exists():
        raise ConfigError(f"{path} is an owner's home already", next_step="isthmus client up --home DIR")
    server_key = PublicKey.from_hex(kit.public_key)
    if server_key.fingerprint != kit.fingerprint:
        raise SignatureError(
            "the kit's key and fingerprint disagree", next_step="ask the operator for a new kit"
        )
    server_keys = ShoreKeys.open(kit.keys.encode("ascii"), server_key)
    Domain.load(data)
    resolve_base(base)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys = path / "keys"
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(keys / "ca.crt", kit.ca_certificate.encode("ascii"))
    identity = SigningKey.ensure(keys / "identity.key")
    enrolled = enrol(
        kit.enrol,
        ca_certificate=keys / "ca.crt",
        domain=kit.domain,
        token=kit.token,
        identity=identity,
        log_key=SigningKey.ensure(keys / "log.key").public,
        tls_csr=make_csr(kit.domain, keys / "tls.key"),
        node_key=node_key(keys / "flower.key"),
        server_key=server_key,
    )
    write_atomic(keys / "tls.crt", enrolled.certificate)
    write_atomic(keys / "superexec.secret", secrets.token_bytes(32), mode=0o600)
    config = ClientConfig(
        domain=kit.domain,
        pseudonym=enrolled.pseudonym,
        server=ServerAddress(
            name=kit.server,
            fleet=kit.fleet,
            exchange=kit.exchange,
            enrol=kit.enrol,
            public_key=kit.public_key,
            log_key=server_keys.log_key,
        ),
        data=str(data.resolve()),
        base=base if base == "embedded" else str(Path(base).resolve()),
        approved_fabs=(kit.fab_sha256,),
        supernode_port=supernode_port,
    )
    for card in kit.witnesses:
        card.add_to(path)
    if not (path / POLICY).exists():  # an owner may have put its own there
        write_policy(path, policy)
    ClientHome.write_config(path, config)
    return ClientHome(path)


def node_key(path: Path) -> bytes:
    """The public half (OpenSSH text) of the Flower node's key, P-384; made at `path` unless it is there."""
    if path.exists():
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        write_atomic(path, pem, mode=0o600)
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
