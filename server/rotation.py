"""A member goes over to new keys."""

from __future__ import annotations

from common.checkpoints import LedgerHome
from common.errors import RefusedError
from common.ledger import Crossing
from common.rotation import Rotation
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
