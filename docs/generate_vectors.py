"""Make `docs/vectors/audit.json` again: fixed answers for whoever writes an auditor in another language.

    python docs/generate_vectors.py

Keys are made of repeated bytes and are worth nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import canonical
from common.files import sha256_bytes
from common.ledger import NO_ENTRY, Crossing, entry_line
from common.merkle import Tree, leaf_hash
from common.notes import Checkpoint, Signer
from common.parcels import Kind, Receipt
from common.roots import Party, Root, RootMember, SignedRoot, Witness, log_origin
from common.signing import SigningKey, pae, seal
from common.statements import TreeHead

PATH = Path(__file__).parent / "vectors" / "audit.json"
SEEDS = {"root": 1, "server identity": 2, "server log": 3, "toys identity": 4, "toys log": 5, "witness": 6}


def key(name: str) -> SigningKey:
    """The example key of this name."""
    return SigningKey(bytes([SEEDS[name]]) * 32)


def ledger() -> tuple[list[bytes], Tree, list[str]]:
    """Five entries of the server's ledger as lines, their tree, and each line's `prev`."""
    lines, tree, previous = [], Tree(), [NO_ENTRY]
    for number in range(5):
        crossing = Crossing(
            "in",
            "data",
            "parcel",
            f"{number:064x}",
            1000 + number,
            "toys",
            "catalog",
            "demo",
            "accepted",
            1700000000,
        )
        lines.append(entry_line(number, previous[-1], asdict(crossing)))
        tree.append(leaf_hash(lines[-1]))
        previous.append(sha256_bytes(lines[-1]))
    return lines, tree, previous


def vectors() -> dict[str, Any]:
    """Everything in the file."""
    lines, tree, previous = ledger()
    signer = Signer(log_origin("server", key("server log").public), key("server log"))
    note = signer.sign(Checkpoint(signer.name, 5, tree.root()).text())
    cosigned = note.with_cosignature(Signer("w1.witness.example", key("witness")), time_s=1700000001)
    receipt = Receipt(
        kind=Kind.CATALOG,
        run="demo",
        sender="toys",
        receiver="server",
        parcel_digest=f"{3:064x}",
        payload_digest="c" * 64,
        verdict="accepted",
        reason="",
        index=3,
        prev=previous[3],
        checkpoint=TreeHead(size=4, root=tree.root(4).hex()),
        proof=tuple(node.hex() for node in tree.inclusion(3, 4)),
        time_s=1700000000,
    )
    member = RootMember(
        domain="toys",
        pseudonym="domain-1",
        identity_key=key("toys identity").public.hex,
        log_key=key("toys log").public.hex,
        certificate_fingerprint="f" * 64,
    )
    root = Root(
        version=1,
        created_s=1700000000,
        expires_s=1800000000,
        threshold=1,
        root_keys=(key("root").public.hex,),
        server=Party(identity_key=key("server identity").public.hex, log_key=key("server log").public.hex),
        witnesses=(Witness(name="w1.witness.example", key=key("witness").public.hex),),
        members=(member,),
    )
    statement = {"b": [1, "two"], "a": {}}
    return {
        "keys": {
            name: {
                "seed": (bytes([seed]) * 32).hex(),
                "public": key(name).public.hex,
                "keyid": key(name).public.key_id,
            }
            for name, seed in SEEDS.items()
        },
        "canonical": {"value": statement, "bytes": canonical.encode(statement).decode()},
        "pae": {"type": "a/b", "payload": "{}", "bytes": pae("a/b", b"{}").decode()},
        "envelope": {
            "statement": statement,
            "signer": "toys identity",
            "bytes": seal(statement, key("toys identity")).decode(),
        },
        "ledger": {
            "lines": [line.decode() for line in lines],
            "leaf_hashes": [leaf_hash(line).hex() for line in lines],
            "roots": [tree.root(size).hex() for size in range(6)],
            "inclusion_of_2_in_5": [node.hex() for node in tree.inclusion(2, 5)],
            "consistency_of_3_with_5": [node.hex() for node in tree.consistency(3, 5)],
        },
        "checkpoint": {"origin": signer.name, "note": str(note), "cosigned": str(cosigned)},
        "receipt": {"signer": "server identity", "bytes": receipt.seal(key("server identity")).decode()},
        "root": {"bytes": SignedRoot.sign(root, [key("root")]).encode().decode()},
    }


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
