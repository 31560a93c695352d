"""Going over to new keys: a member's, and the server's own."""

from __future__ import annotations

from pathlib import Path

from common.checkpoints import LedgerHome
from common.errors import ConfigError, RefusedError
from common.files import write_atomic
from common.ledger import Crossing
from common.parcels import EVERYONE
from common.processes import listens
from common.rotation import Rotation
from server.home import ServerHome
from server.members import Member, Members


def rotate(home: LedgerHome, members: Members, member: Member, data: bytes) -> int:
    """Take `member`'s new keys; the size of the server's ledger from which on only they count.

    The same rotation again changes nothing. Raises SignatureError, ParcelError (malformed), RefusedError
    (`sender`: another domain's; `rotated`: the key was replaced before; `already-member`: a key that is or
    was somebody's), StorageError.
    """
    rotation = Rotation.open(data)
    keys = rotation.keys
    if keys.shore != member.domain:
        raise RefusedError("these are another domain's keys", reason="sender")
    with home.ledger.locked():
        now = members.get(member.domain)
        if now is None or now.is_revoked:
            raise RefusedError("this member was revoked", reason="revoked")
        if keys.identity_key == now.identity_key and keys.log_key == now.log_key and now.retired:
            return int(now.retired[0]["size"])
        if keys.replaces != now.identity_key:
            raise RefusedError("the key was replaced before, or is not this domain's", reason="rotated")
        if keys.identity_key == keys.log_key or {keys.identity_key, keys.log_key} & members.keys():
            raise RefusedError("a key is or was another key of somebody's", reason="already-member")
        home.keep_rotation(data)
        home.ledger.record_once(Crossing.of_keys("in", member.domain, data))
        size = len(home.ledger)
        members.rotate(keys, ledger_size=size)
        return size


def rotate_own(path: Path, out: Path) -> ServerHome:
    """Give the server at `path` new identity and log keys, and write the rotation for its owners to `out`.

    Safe to repeat after a crash. Raises ConfigError while it serves or a run is open, StorageError.
    """
    home = ServerHome(path)
    if listens("127.0.0.1", home.config.ports.superlink):
        raise ConfigError("the server is up", next_step="end isthmus server up first")
    if home.runs.open():
        raise ConfigError(
            "a run is open, and its orders are signed with the old key", next_step="isthmus run list"
        )
    done = home.path / "rotation.json"  # of a rotation that a crash left between its steps
    if not done.exists():
        rotation = home.rotation_to_new_keys()
        with home.ledger.locked():
            home.ledger.record_once(Crossing.of_keys("out", EVERYONE, rotation.data))
            home.retire_keys(len(home.ledger))
        write_atomic(done, rotation.data)
    write_atomic(out, done.read_bytes())
    home.take_new_keys()
    renewed = ServerHome(path)
    renewed.keep_checkpoint()
    done.unlink()
    return renewed
