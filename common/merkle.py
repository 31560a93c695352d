"""Merkle trees: RFC 9162 section 2.1, with SHA-256.

    >>> tree = Tree()
    >>> for entry in (b"a", b"b", b"c"):
    ...     tree.append(leaf_hash(entry))
    >>> verify_inclusion(2, 3, leaf_hash(b"c"), tree.inclusion(2), tree.root())
    >>> verify_consistency(2, 3, tree.consistency(2), tree.root(2), tree.root())

A proof that does not verify raises ProofError. Hashes are 32 raw bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from common.errors import ProofError

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """The hash of an entry (RFC 9162, 2.1.1)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """An append-only tree, with the roots and proofs of every size that it ever had.

    All complete subtrees are kept, 64 bytes an entry. Appending is O(1) on average, a root O(log n).
    """

    def __init__(self) -> None:
        self._levels: list[bytearray] = [bytearray()]

    def __len__(self) -> int:
        return len(self._levels[0]) // HASH_BYTES

    def append(self, leaf: bytes) -> None:
        """Add an entry by its `leaf_hash`."""
        level, node = 0, leaf
        while True:
            row = self._levels[level]
            row += node
            if len(row) // HASH_BYTES % 2:
                return
            node = hashlib.sha256(b"\x01" + row[-2 * HASH_BYTES :]).digest()  # `node_hash` of the last two
            level += 1
            if level == len(self._levels):
                self._levels.append(bytearray())

    def root(self, size: int | None = None) -> bytes:
        """The root of the first `size` entries (None: of all)."""
        size = self._known(size)
        return self._range(0, size) if size else EMPTY_ROOT

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """PATH(index, D[size]): that entry `index` is among the first `size` (RFC 9162, 2.1.3.1)."""
        size = self._known(size)
        if not 0 <= index < size:
            raise ProofError(f"there is no entry {index} among the first {size}")
        start, end, path = 0, size, []
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start = middle
        return path[::-1]

    def consistency(self, old: int, size: int | None = None) -> list[bytes]:
        """PROOF(old, D[size]): that the tree of size `old` is the beginning of this one (2.1.4.1)."""
        size = self._known(size)
        if not 0 <= old <= size:
            raise ProofError(f"a tree of {size} entries never had {old}")
        if old in (0, size):
            return []
        start, end, path = 0, size, []
        while old - start < end - start:
            middle = start + _split(end - start)
            if old <= middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start = middle
        return ([self._range(start, end)] if start else []) + path[::-1]

    def _known(self, size: int | None) -> int:
        if size is None:
            return len(self)
        if not 0 <= size <= len(self):
            raise ProofError(f"the tree has {len(self)} entries, not {size}")
        return size

    def _node(self, level: int, position: int) -> bytes:
        return bytes(self._levels[level][position * HASH_BYTES : (position + 1) * HASH_BYTES])

    def _range(self, start: int, end: int) -> bytes:
        """The hash of entries `start` to `end`: complete subtrees, joined from the right."""
        nodes = []
        while start < end:
            level = (end - start).bit_length() - 1
            nodes.append(self._node(level, start >> level))
            start += 1 << level
        found = nodes.pop()
        while nodes:
            found = node_hash(nodes.pop(), found)
        return found


def _split(size: int) -> int:
    """The largest power of two below `size`, which is at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def root_of_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes]) -> bytes:
    """The root that an inclusion proof leads to (RFC 9162, 2.1.3.2). Raises ProofError by its form."""
    if not 0 <= index < size:
        raise ProofError(f"there is no entry {index} among {size}")
    _hashes([leaf, *proof])
    found, last = leaf, size - 1
    for node in proof:
        if last == 0:
            raise ProofError("the proof is too long")
        if index & 1 or index == last:
            found = node_hash(node, found)
            while not index & 1 and index:
                index, last = index >> 1, last >> 1
        else:
            found = node_hash(found, node)
        index, last = index >> 1, last >> 1
    if last:
        raise ProofError("the proof is too short")
    return found


def verify_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes], root: bytes) -> None:
    """Raises ProofError unless `leaf` is entry `index` of the tree with this size and root."""
    if root_of_inclusion(index, size, leaf, proof) != root:
        raise ProofError(f"entry {index} is not in the tree of size {size} with this root")


def verify_consistency(old: int, size: int, proof: Sequence[bytes], old_root: bytes, root: bytes) -> None:
    """Raises ProofError unless the tree (`size`, `root`) begins with the tree (`old`, `old_root`) (2.1.4.2).

    Every tree begins with the empty one, whose root is `EMPTY_ROOT`.
    """
    if not 0 <= old <= size:
        raise ProofError(f"a tree of {size} entries cannot have grown from {old}")
    _hashes([old_root, root, *proof])
    if old in (0, size):
        agree = (old_root == root or old < size) and (old_root == EMPTY_ROOT or old > 0)
        if proof or not agree:
            raise ProofError(f"the trees of size {old} and {size} do not agree")
        return
    path = list(proof) if old & (old - 1) else [old_root, *proof]
    if not path:
        raise ProofError("the proof is too short")
    first, last = old - 1, size - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    found_old = found = path[0]
    for node in path[1:]:
        if last == 0:
            raise ProofError("the proof is too long")
        if first & 1 or first == last:
            found_old, found = node_hash(node, found_old), node_hash(node, found)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            found = node_hash(found, node)
        first, last = first >> 1, last >> 1
    if last:
        raise ProofError("the proof is too short")
    if (found_old, found) != (old_root, root):
        raise ProofError(f"the tree of size {size} did not grow from the one of size {old}")


def _hashes(nodes: Sequence[bytes]) -> None:
    for node in nodes:
        if len(node) != HASH_BYTES:
            raise ProofError("a hash is 32 bytes long")
