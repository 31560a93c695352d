"""The audit in plain words: what a finding means, what each kind of message is, and the glossary.

Written for a reader who is responsible for personal data and need not know how any of it is computed.
"""

from __future__ import annotations

MEANINGS = {
    "damaged": "The ledger was edited or cut after it was written, at this line or just before it.",
    "truncated": "Entries that the owner of this ledger once signed for are gone from its end.",
    "rewritten": "This ledger is not the one that its owner signed, and others saw.",
    "other-history": "Its owner told others, signed, of a ledger that differs from this one.",
    "checkpoint": "A signature that closes this ledger does not verify.",
    "no-checkpoint": "Nobody has signed for this ledger as a whole, so its end could have been cut off.",
    "header": "The signed description of this parcel is missing or forged.",
    "sender": "The parcel was signed by another party than the ledger says.",
    "recipient": "The parcel was addressed to somebody else.",
    "run": "The parcel belongs to another run than the ledger says.",
    "size": "The parcel has another size than the ledger says.",
    "order": "The parcel speaks of entries that were written only after it.",
    "nonce": "The number that may be used only once was used for two parcels.",
    "kind": "Something crossed that this party may never send, or that is not what the ledger says.",
    "embedding-table": "A word table crossed. It can give away which words occur in the private data.",
    "payload": "The content is not what its signed description says.",
    "receipt": "The receipt is missing, forged, or about something else.",
    "never-sent": "One party recorded that it came; the other's ledger never sent it.",
    "repeated": "The same thing is in the ledger twice.",
    "revoked": "It was accepted from a member whose membership had been withdrawn.",
    "rotated": "It was accepted under a key that its owner had replaced by then.",
    "keys": "Keys were exchanged, and not in the way that the root file and both signatures say.",
    "unwitnessed": "The root file names independent witnesses, and none of them saw this ledger.",
    "withdrawn": "A task vector was accepted after it had been withdrawn.",
    "no-ledger": "There was nothing to check.",
    "unknown-shore": "The bundle holds a ledger of somebody who is not in the root file.",
    "unknown-peer": "The ledger records dealings with somebody who is not in the root file.",
}

KINDS = {
    "domain-card": "a few facts about a domain, such as how many items it has",
    "catalog": "the domain's items with the texts that it chose to make public",
    "task-vector": "what fine-tuning on private data changed in the model, as tensors",
    "metrics": "averages of how well a model ranks, where the owner allows them",
    "fitness": "how well candidates of a merge do on the owner's data, one average each",
    "candidate": "a merged model that the owners are asked to measure, or what they are to mix one from",
    "universal-model": "the merged model that everybody gets",
    "revocation": "the notice that something earlier no longer counts",
    "receipt": "the receiver's signed word that a parcel came, and whether it was taken",
    "checkpoint": "the state of a ledger as one signed hash, shown to the other side or to a witness",
    "keys": "a party's new signing keys, signed with the old and the new one",
    "message": "a control message: an order, a reply or a status code, recorded by its digest and size",
}

GLOSSARY = {
    "Bundle": "The folder that was checked: ledgers, signed headers, receipts and perhaps payloads.",
    "Checkpoint": "A signature over a ledger as a whole at one moment. What it covers cannot be cut off or "
    "changed without this being seen.",
    "Digest": "A fingerprint of bytes (SHA-256). Two different files do not have the same one.",
    "Domain": "A company that takes part with data of its own.",
    "Entry": "One line of a ledger, numbered from 0.",
    "Epsilon": "The measure of differential privacy: the smaller, the less the result can say about any "
    "one person. A dash means that none was claimed.",
    "Finding": "Something that must not be.",
    "Ledger": "A list to which a party can only add. What crosses is written into it before it crosses.",
    "Merkle root": "A fingerprint of a whole ledger; it changes if any entry does.",
    "Parcel": "One thing that crossed: a signed header and a payload.",
    "Payload": "The content of a parcel: a table of tensors, a catalog, or figures.",
    "Receipt": "What the receiver signs for a parcel, so that neither side can deny it later.",
    "Root file": "The list of whose keys count. The auditor gets it from its signers and compares the "
    "fingerprint of its key by telephone or in person.",
    "Shore": "A party to the crossing: the merge server, or a domain.",
    "Task vector": "What fine-tuning changed in the model. It says something about the data behind it.",
    "Tensor": "A named block of numbers in a task vector or a model.",
    "Witness": "An independent party that sees nothing but the states of ledgers, and signs that they grow.",
    "Unacknowledged": "Sent, but without a receipt. A crash or a cut link can be the reason; it may or may "
    "not have arrived.",
}


def withdrawn(item: dict[str, int | str]) -> str:
    """One of `DomainReport.withdrawn`: what of a vector is withdrawn, who asked, who was told."""
    what = f"the task vector of run {item['run']}, entry {item['index']} of {item['shore']}"
    if not item["revocation"]:
        return f"asked to withdraw: {what}; the server has given out no revocation of it"
    told = "" if item["told"] else "; nothing shows that the domain was told"
    return f"withdrawn{', as it asked' if item['asked'] else ''}: {what}{told}"
