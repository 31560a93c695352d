"""Two kinds of process that a test kills: the Exchange over a `Shore`, and an owner that sends and fetches.

Each takes up its work from its files alone. What an owner writes into its pipe is acknowledged: it must be in
the ledgers exactly once for ever after.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from crossing import BASE, RUN, Shore, make_metrics, make_vector

from clients.egress import EgressGate
from clients.exchange_client import ExchangeClient
from clients.policy import EgressPolicy
from common.files import sha256_bytes
from common.ledger import Crossing, Journal, Ledger
from common.parcels import SERVER, Codec, Kind, draft
from common.signing import PublicKey, SigningKey
from common.tls import TlsFiles

LARGE = {"layer.weight": (512, 512)}  # 1 MiB in float32, so that kills hit uploads and downloads, too
PLENTY = 1_000_000
PATIENCE_S = 120.0


def server_at(home: Path) -> Shore:
    """The server's files, with a run that never ends."""
    shore = Shore(home, LARGE)
    run = shore.store.run(RUN)
    assert run is not None
    shore.store.open_run(run.model_copy(update={"quota_parcels": PLENTY, "quota_bytes": PLENTY << 20}))
    return shore


def serve(home: Path, port: int, ready: Any) -> None:
    """The Exchange, until it is killed."""
    shore = server_at(home)
    serving = shore.serve(f"127.0.0.1:{port}")
    ready.send_bytes(b"ready")
    serving.wait()


def own(home: Path, domain: str, server: Path, port: int, models: list[str], until: int, said: Any) -> None:
    """Do jobs 0 to `until`, each once: a message, a small or a large parcel, a download."""
    journal = Journal(home / "journal.jsonl")
    ledger = Ledger(home / "ledger.jsonl")
    policy = EgressPolicy(max_run_parcels=PLENTY)
    key = SigningKey.load(home / "keys" / "identity.key")
    gate = EgressGate(policy, key, ledger, journal, home / "outbox", sender=domain)
    gate.agree(RUN, BASE, LARGE, labels=("zero-shot",))
    tls = TlsFiles(server / "keys" / "ca.crt", home / "keys" / "tls.crt", home / "keys" / "tls.key")
    server_key: PublicKey = SigningKey.load(server / "keys" / "identity.key").public
    client = ExchangeClient(
        f"127.0.0.1:{port}", tls, gate, server_key, retry_for_s=PATIENCE_S, sleep=lambda _: time.sleep(0.05)
    )
    for job in range(len(journal.items("job/")), until):
        content = f"{domain} {job} {time.time_ns()}".encode()
        message = Crossing(
            "out", "control", "message", sha256_bytes(content), len(content), SERVER, "message", RUN
        )
        ledger.record(message)
        said.send_bytes(f"message {message.digest}".encode())
        if job % 7 == 3:
            model = models[job // 7 % len(models)]
            client.fetch(model, home / "got")
            said.send_bytes(f"fetched {model}".encode())
        else:
            parcel = gate.release(*_parcel(home, domain, job))
            client.send(parcel)
            said.send_bytes(f"sent {parcel.digest}".encode())
        journal.put(f"job/{job:06d}", {})


def _parcel(home: Path, domain: str, job: int) -> Any:
    path = home / "next"
    if job % 7 == 5:
        kind, codec = Kind.TASK_VECTOR, Codec.FP32
        make_vector(path, 1_000_000 * (domain == "toys") + job, LARGE)
    else:
        kind, codec = Kind.METRICS, Codec.JSON
        make_metrics(path, **{"recall@10": job / 1_000_000})
    header = draft(
        path, kind=kind, run=RUN, sender=domain, recipient=SERVER, base_digest=BASE, codec=codec,
        training={"users_bucket": 200},
    )  # fmt: skip
    return header, path
