"""Join kits: what the operator hands to a domain's owner. Nothing in it is a secret of the server.

A JSON file with the server's addresses, its CA certificate and identity key (the fingerprint is to be
compared by telephone), the SHA-256 of the app bundle, what runs here ask for, and the one-time token.
"""

from __future__ import annotations

import json
from pathlib import Path

from common.files import write_atomic
from common.kit import SCHEMA_VERSION, JoinKit
from common.parcels import SERVER
from common.rotation import ShoreKeys
from common.witness.card import witnesses_of
from server.home import ServerHome
from server.superlink import fab_sha256


def write_kit(home: ServerHome, domain: str, path: Path) -> JoinKit:
    """Invite `domain` and write its kit to `path`. An earlier invitation of the domain stops working."""
    kit = JoinKit(
        schema_version=SCHEMA_VERSION,
        domain=domain,
        server=home.config.name,
        fleet=home.address("fleet"),
        exchange=home.address("exchange"),
        enrol=home.address("enrol"),
        public_key=home.identity.public.hex,
        fingerprint=home.identity.public.fingerprint,
        ca_certificate=(home.keys / "ca.crt").read_text(encoding="ascii"),
        fab_sha256=fab_sha256(),
        keys=ShoreKeys(
            shore=SERVER, identity_key=home.identity.public.hex, log_key=home.log_signer.key.public.hex
        )
        .seal(home.identity)
        .decode("ascii"),
        witnesses=tuple(witnesses_of(home.path)),
        token=home.invitations.invite(domain),
    )
    write_atomic(path, json.dumps(kit.model_dump(), indent=1).encode(), mode=0o600)
    return kit
