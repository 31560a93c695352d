"""RFC 9162 trees: published vectors, and every small tree and proof against the recursive definition."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ProofError
from common.merkle import (
    EMPTY_ROOT,
    Tree,
    leaf_hash,
    root_of_inclusion,
    verify_consistency,
    verify_inclusion,
)

# The reference entries, roots and proofs of Certificate Transparency (transparency-dev/merkle).
ENTRIES = [
    bytes.fromhex(entry)
    for entry in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    bytes.fromhex(root)
    for root in (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    )
]
_A, _B, _C = (
    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
)
_D, _E, _F = (
    "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
)
_G, _H = (
    "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
    "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f",
)
_ROOT_1, _ROOT_2 = ROOTS[0].hex(), ROOTS[1].hex()
INCLUSION = [  # index, size, proof
    (0, 1, ()),
    (0, 8, (_A, _B, _C)),
    (5, 8, (_D, _E, _F)),
    (2, 3, (_ROOT_2,)),
    (1, 5, (_ROOT_1, _B, _D)),
]
CONSISTENCY = [  # old size, size, proof
    (1, 1, ()),
    (1, 8, (_A, _B, _C)),
    (6, 8, (_G, _E, _F)),
    (2, 5, (_B, _D)),
    (6, 7, (_G, _H, _F)),
]
SOME_HASH = bytes.fromhex("abacaba000000000000000000000000000000000000000000060061e00123456")


def _bytes(proof: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(node) for node in proof]


def _tree(entries: Sequence[bytes]) -> Tree:
    tree = Tree()
    for entry in entries:
        tree.append(leaf_hash(entry))
    return tree


def _refused(check: Callable[[], None]) -> bool:
    try:
        check()
    except ProofError:
        return True
    return False


def test_reference_roots() -> None:
    tree = _tree(ENTRIES)
    assert tree.root(0) == EMPTY_ROOT == hashlib.sha256(b"").digest()
    assert [tree.root(size) for size in range(1, 9)] == ROOTS


@pytest.mark.parametrize(("index", "size", "proof"), INCLUSION)
def test_reference_inclusion_proofs_and_their_corruptions(
    index: int, size: int, proof: tuple[str, ...]
) -> None:
    leaf, root, nodes = leaf_hash(ENTRIES[index]), ROOTS[size - 1], _bytes(proof)
    assert _tree(ENTRIES).inclusion(index, size) == nodes
    verify_inclusion(index, size, leaf, nodes, root)
    wrong: list[tuple[int, int, bytes, bytes, list[bytes]]] = [
        (index - 1, size, leaf, root, nodes),
        (index + 1, size, leaf, root, nodes),
        (index ^ 2, size, leaf, root, nodes),
        (index, size * 2, leaf, root, nodes),
        (index, size // 2, leaf, root, nodes),
        (index, size, b"WrongLeaf", root, nodes),
        (index, size, b"", root, nodes),
        (index, size, leaf, EMPTY_ROOT, nodes),
        (index, size, leaf, SOME_HASH, nodes),
        (index, size, leaf, b"", nodes),
        (index, size, leaf, root, [*nodes, b""]),
        (index, size, leaf, root, [*nodes, root]),
        (index, size, leaf, root, [b"", *nodes]),
        (index, size, leaf, root, [root, *nodes]),
    ]
    wrong += [(index, size, leaf, root, _flip(nodes, place, 8)) for place in range(len(nodes))]
    if nodes:
        wrong.append((index, size, leaf, root, nodes[:-1]))
        wrong.append((index, size, leaf, root, [nodes[0], SOME_HASH, *nodes[1:]]))
    accepted = [
        case for case in wrong if not _refused(lambda c=case: verify_inclusion(c[0], c[1], c[2], c[4], c[3]))
    ]
    assert accepted == []


@pytest.mark.parametrize(("old", "size", "proof"), CONSISTENCY)
def test_reference_consistency_proofs_and_their_corruptions(
    old: int, size: int, proof: tuple[str, ...]
) -> None:
    old_root, root, nodes = ROOTS[old - 1], ROOTS[size - 1], _bytes(proof)
    assert _tree(ENTRIES).consistency(old, size) == nodes
    verify_consistency(old, size, nodes, old_root, root)
    if not nodes:
        return
    wrong: list[tuple[int, int, list[bytes], bytes, bytes]] = [
        (old - 1, size, nodes, old_root, root),
        (old + 1, size, nodes, old_root, root),
        (old ^ 2, size, nodes, old_root, root),
        (old, size * 2, nodes, old_root, root),
        (old, size // 2, nodes, old_root, root),
        (old, size, nodes, b"WrongRoot", root),
        (old, size, nodes, old_root, b"WrongRoot"),
        (old, size, nodes, root, old_root),
        (old, size, [], old_root, root),
        (old, size, nodes[:-1], old_root, root),
    ]
    for more in (b"", old_root, root):
        wrong.append((old, size, [*nodes, more], old_root, root))
        wrong.append((old, size, [more, *nodes], old_root, root))
    wrong.append((old, size, [nodes[0], *nodes], old_root, root))
    wrong += [(old, size, _flip(nodes, place, 16), old_root, root) for place in range(len(nodes))]
    accepted = [case for case in wrong if not _refused(lambda c=case: verify_consistency(*c))]
    assert accepted == []


def test_trees_that_agree_or_disagree_without_a_proof() -> None:
    verify_consistency(0, 0, [], EMPTY_ROOT, EMPTY_ROOT)
    verify_consistency(0, 3, [], EMPTY_ROOT, ROOTS[2])
    for old, size, old_root, root, proof in (
        (0, 3, ROOTS[0], ROOTS[2], []),  # an empty tree has one root only
        (0, 0, EMPTY_ROOT, ROOTS[0], []),
        (1, 1, ROOTS[0], ROOTS[1], []),
        (2, 1, ROOTS[1], ROOTS[0], []),
        (1, 2, ROOTS[0], ROOTS[1], []),
        (1, 1, ROOTS[0], ROOTS[0], [ROOTS[0]]),
        (-1, 1, ROOTS[0], ROOTS[0], []),
    ):
        with pytest.raises(ProofError):
            verify_consistency(old, size, proof, old_root, root)


def test_every_proof_of_small_trees_follows_the_definition() -> None:
    entries = [bytes([number]) for number in range(33)]
    tree = _tree(entries)
    for size in range(1, len(entries) + 1):
        assert tree.root(size) == _mth(entries[:size])
        for index in range(size):
            assert tree.inclusion(index, size) == _path(index, entries[:size])
            verify_inclusion(
                index, size, leaf_hash(entries[index]), tree.inclusion(index, size), tree.root(size)
            )
        for old in range(size + 1):
            proof = tree.consistency(old, size)
            verify_consistency(old, size, proof, tree.root(old), tree.root(size))
            if 0 < old < size:
                assert proof == _subproof(old, entries[:size], True)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.data())
def test_a_leaf_proves_only_its_own_place(size: int, data: st.DataObject) -> None:
    tree = _tree([number.to_bytes(2, "big") for number in range(size)])
    index = data.draw(st.integers(0, size - 1))
    other = data.draw(st.integers(0, size - 1).filter(lambda number: number != index)) if size > 1 else None
    proof = tree.inclusion(index)
    assert root_of_inclusion(index, size, leaf_hash(index.to_bytes(2, "big")), proof) == tree.root()
    if other is not None:
        with pytest.raises(ProofError):
            verify_inclusion(other, size, leaf_hash(index.to_bytes(2, "big")), proof, tree.root())


def test_what_a_tree_never_had_is_refused() -> None:
    tree = _tree(ENTRIES[:3])
    for ask in (
        lambda: tree.root(4),
        lambda: tree.root(-1),
        lambda: tree.inclusion(3),
        lambda: tree.inclusion(-1),
        lambda: tree.inclusion(2, 2),
        lambda: tree.consistency(4),
        lambda: tree.consistency(-1),
    ):
        with pytest.raises(ProofError):
            ask()


def _flip(nodes: list[bytes], place: int, bits: int) -> list[bytes]:
    changed = bytes([nodes[place][0] ^ bits]) + nodes[place][1:]
    return [*nodes[:place], changed, *nodes[place + 1 :]]


# RFC 9162, 2.1, as it is written there.


def _split(size: int) -> int:
    k = 1
    while 2 * k < size:
        k *= 2
    return k


def _mth(entries: Sequence[bytes]) -> bytes:
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = _split(len(entries))
    return hashlib.sha256(b"\x01" + _mth(entries[:k]) + _mth(entries[k:])).digest()


def _path(index: int, entries: Sequence[bytes]) -> list[bytes]:
    if len(entries) == 1:
        return []
    k = _split(len(entries))
    if index < k:
        return [*_path(index, entries[:k]), _mth(entries[k:])]
    return [*_path(index - k, entries[k:]), _mth(entries[:k])]


def _subproof(old: int, entries: Sequence[bytes], complete: bool) -> list[bytes]:
    if old == len(entries):
        return [] if complete else [_mth(entries)]
    k = _split(len(entries))
    if old <= k:
        return [*_subproof(old, entries[:k], complete), _mth(entries[k:])]
    return [*_subproof(old - k, entries[k:], False), _mth(entries[:k])]
