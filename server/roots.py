"""The server's part in `root.json`: a new version whenever keys or members have changed.

The root key is made beside the other keys of the server's home. Whoever wants it elsewhere moves
`keys/root.key` away and brings it for the moment of signing (`isthmus server root --key FILE`). Several
holders sign one after the other (`isthmus root`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

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
    is no key or more than one must sign, ParcelError or SignatureError when the one in the home is damaged or
    of another root key.
    """
    known = _known(home)
    if known is not None and not _is_due(known.root, home, int(time.time())):
        return known
    if known is not None and known.root.threshold > 1:
        raise ConfigError(
            f"members or keys have changed, and {known.root.threshold} root keys must sign",
            next_step="isthmus root draft --out FILE",
        )
    key = key or home.keys / "root.key"
    if not key.exists():
        raise ConfigError(
            f"{key}: no root key, and members or keys have changed since root.json was signed",
            next_step="isthmus server root --key FILE",
        )
    signer = SigningKey.load(key)
    keys = None if known is not None else [signer.public.hex]
    return install_root(home, draft_root(home, keys).with_signatures([signer]))


def draft_root(
    home: ServerHome, root_keys: Sequence[str] | None = None, threshold: int | None = None
) -> SignedRoot:
    """The next version as it must be now, without signatures. Keys and threshold are as before unless given.

    Raises ConfigError when it cannot be: no root keys for the first version, or too few for the threshold.
    """
    known = _known(home)
    keys = tuple(sorted(root_keys)) if root_keys else known.root.root_keys if known else ()
    count = threshold or (known.root.threshold if known else 1)
    if count > len(keys):
        raise ConfigError(
            f"a threshold of {count} needs as many root keys, and there are {len(keys)}",
            next_step="isthmus root key FILE makes one; name them all with --root-key",
        )
    try:
        return SignedRoot(_wanted(home, keys, count, known.root.version + 1 if known else 1), {})
    except ValidationError as err:
        raise ConfigError(
            f"no root file can be made of this: {err.errors(include_url=False)[0]['msg']}",
            next_step="root keys are 64 hexadecimal digits, each for one purpose",
        ) from None


def install_root(home: ServerHome, signed: SignedRoot) -> SignedRoot:
    """Make `signed` the root file of this home, and return it.

    Raises SignatureError (too few signatures), ParcelError (it does not follow the one before, or has
    expired), ConfigError (members or keys have changed since it was drafted), StorageError.
    """
    known, now_s = _known(home), int(time.time())
    signed.verify_self()
    if known is not None:
        signed.verify_after(known.root, now_s=now_s)
    if _is_due(signed.root, home, now_s):
        raise ConfigError(
            "members or keys have changed since this root file was drafted, or it soon expires",
            next_step="isthmus root draft --out FILE",
        )
    signed.save(home.path / "roots" / f"{signed.root.version}.json")
    signed.save(root_path(home))
    return signed


def current_root(home: ServerHome) -> SignedRoot:
    """As `newest_root`, or where nobody here can sign, the one there is. Raises ConfigError without any."""
    try:
        return newest_root(home)
    except ConfigError:
        known = _known(home)
        if known is None:
            raise
        return known


def root_versions(home: ServerHome) -> list[SignedRoot]:
    """Every version that was signed here, oldest first, the newest one made if it is due and can be."""
    current_root(home)
    paths = sorted((home.path / "roots").glob("*.json"), key=lambda path: int(path.stem))
    return [SignedRoot.load(path) for path in paths]


def keep_checkpoints(home: ServerHome) -> None:
    """Sign what the ledger is now, and have every witness cosign it. Raises LedgerError, StorageError."""
    home.keep_checkpoint()
    if witnesses_of(home.path):

        def release(note: str, peer: str, size: int) -> None:
            home.ledger.record(Crossing.of_checkpoint("out", peer, note, size))

        ask_witnesses(home, release, root_versions(home))


def _known(home: ServerHome) -> SignedRoot | None:
    return SignedRoot.load(root_path(home)) if root_path(home).exists() else None


def _is_due(root: Root, home: ServerHome, now_s: int) -> bool:
    """Whether keys or members have changed since, or the root soon expires."""
    wanted = _wanted(home, root.root_keys, root.threshold, root.version, root.created_s)
    return wanted != root or root.expires_s < now_s + RENEW_BEFORE_S


def _wanted(
    home: ServerHome, root_keys: tuple[str, ...], threshold: int, version: int, created_s: int | None = None
) -> Root:
    created_s = int(time.time()) if created_s is None else created_s
    return Root(
        version=version,
        created_s=created_s,
        expires_s=created_s + LIFETIME_S,
        threshold=threshold,
        root_keys=root_keys,
        server=Party(
            identity_key=home.identity.public.hex,
            log_key=home.log_signer.key.public.hex,
            retired=home.retired_keys,
        ),
        witnesses=tuple(card.in_root for card in witnesses_of(home.path)),
        members=tuple(member.in_root for member in home.members.all()),
    )
