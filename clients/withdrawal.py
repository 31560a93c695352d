"""`isthmus client withdraw`: an owner takes back its task vector, by a signed revocation to the server.

The server merges the vector no more from the moment it accepts that, in this run or another, and its receipt
proves that it did. A model without the vector is published when the operator types `isthmus run withdraw`.
"""

from __future__ import annotations

from clients.exchange_client import ExchangeClient
from clients.home import ClientHome
from common.errors import ConfigError
from common.files import write_atomic
from common.parcels import SERVER, Codec, Header, Kind, Receipt, draft
from common.revocation import Revocation


def ask(home: ClientHome, run: str = "") -> tuple[str, Receipt]:
    """Withdraw the vector that went to `run` (or the only one that begins so; empty: the newest).

    Returns the run's id and the server's receipt; again, the same. Raises ConfigError where no such vector
    was sent, and what `ExchangeClient.send` raises.
    """
    digest, vector = _vector(home, run)
    home.journal.put(f"withdrawn/{vector.payload_digest}", {"run": vector.run})
    payload = home.work(vector.run) / "revocation.json"
    write_atomic(payload, Revocation(digest, vector.payload_digest).encode())
    tensors = {fact.name: fact.shape for fact in vector.tensors}
    home.gate.agree(vector.run, vector.base_digest, tensors)
    header = draft(
        payload,
        kind=Kind.REVOCATION,
        run=vector.run,
        sender=home.config.domain,
        recipient=SERVER,
        base_digest=vector.base_digest,
        codec=Codec.JSON,
    )
    parcel = home.gate.release(header, payload)
    client = ExchangeClient(home.config.server.exchange, home.tls, home.gate, home.server_key)
    receipt = client.send(parcel)
    home.keep_checkpoint()
    return vector.run, receipt


def _vector(home: ClientHome, run: str) -> tuple[str, Header]:
    """Digest and header of the newest task vector that was sent to `run`."""
    found = []
    for entry in home.ledger:
        body = entry.body
        if (body["direction"], body["type"], body["kind"]) != ("out", "parcel", Kind.TASK_VECTOR):
            continue
        if str(body["run"]).startswith(run) and home.journal.get(f"sent/{body['digest']}") is not None:
            found.append(str(body["digest"]))
    if not found:
        raise ConfigError(
            f"no vector was sent to {run or 'any run'}", next_step="see ledger.jsonl in this home"
        )
    header = Header.stored((home.path / "outbox" / f"{found[-1]}.dsse").read_bytes())
    return found[-1], header
