"""The server's part in `root.json`: a new version whenever keys or members have changed.

The root key is made beside the other keys of the server's home. Whoever wants it elsewhere moves
`keys/root.key` away and brings it for the moment of signing (`isthmus server root --key FILE`).
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from common.errors import ConfigError
from common.ledger import Crossing
from common.roots import LIFETIME_S, Party, Root, SignedRoot
from common.signing import SigningKey
from common.witness.card import witnesses_of
from common.witness.client import ask_witnesses
from server.home import ServerHome

RENEW_BEFORE_S = 60 * 24 * 3600


def root_path(home: ServerHome) -> Path:
    """Where the newest version is."""
    return home.path / "root.json"


def newest_root(home: ServerHome, key: Path | None = None) -> SignedRoot:
    """The root as it must be now: the one in the home, or the next version of it, signed and written.

    `key` is the root key's file (None: the home's). Raises ConfigError when a new version is due and there
    is no key, ParcelError or SignatureError when the one in the home is damaged or of another root key.
    """
    path, now_s = root_path(home), int(time.time())
    known = SignedRoot.load(path) if path.exists() else None
    if known is not None and not _is_due(known.root, home, now_s):
        return known
    key = key or home.keys / "root.key"
    if not key.exists():
        raise ConfigError(
            f"{key}: no root key, and members or keys have changed since root.json was signed",
            next_step="isthmus server root --key FILE",
        )
    signer = SigningKey.load(key)
    keys = known.root.root_keys if known else (signer.public.hex,)
    root = _wanted(home, keys, known.root.version + 1 if known else 1, now_s)
    signed = SignedRoot.sign(root, [signer])
    signed.verify_self()
    if known is not None:
        signed.verify_after(known.root, now_s=now_s)
    signed.save(home.path / "roots" / f"{root.version}.json")
    signed.save(path)
    return signed


def root_versions(home: ServerHome) -> list[SignedRoot]:
    """Every version that was signed here, oldest first, the newest one made if it is due and can be."""
    with contextlib.suppress(ConfigError):  # the root key is elsewhere: its holder signs when he is asked to
        newest_root(home)
    paths = sorted((home.path / "roots").glob("*.json"), key=lambda path: int(path.stem))
    return [SignedRoot.load(path) for path in paths]


def keep_checkpoints(home: ServerHome) -> None:
    """Sign what the ledger is now, and have every witness cosign it. Raises LedgerError, StorageError."""
    home.keep_checkpoint()
    if witnesses_of(home.path):

        def release(note: str, peer: str, size: int) -> None:
            home.ledger.record(Crossing.of_checkpoint("out", peer, note, size))

        ask_witnesses(home, release, root_versions(home))


def _is_due(root: Root, home: ServerHome, now_s: int) -> bool:
    """Whether keys or members have changed since, or the root soon expires."""
    wanted = _wanted(home, root.root_keys, root.version, root.created_s)
    return wanted != root or root.expires_s < now_s + RENEW_BEFORE_S


def _wanted(home: ServerHome, root_keys: tuple[str, ...], version: int, created_s: int) -> Root:
    return Root(
        version=version,
        created_s=created_s,
        expires_s=created_s + LIFETIME_S,
        threshold=1,
        root_keys=root_keys,
        server=Party(identity_key=home.identity.public.hex, log_key=home.log_signer.key.public.hex),
        witnesses=tuple(card.in_root for card in witnesses_of(home.path)),
        members=tuple(member.in_root for member in home.members.all()),
    )
