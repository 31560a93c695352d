"""The Exchange's process: the data channel and enrolment, each on its own port."""

from __future__ import annotations

import logging
import signal
import threading

from common.files import sha256_bytes
from common.guard import check_imports
from common.ledger import Journal
from common.tls import CertificateAuthority, TlsFiles
from server.enrolment import Enroller
from server.exchange import serve as serve_exchange
from server.exchange import serve_enrolment
from server.home import ServerHome
from server.intake import Intake
from server.superlink import register_node


def serve(home: ServerHome) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    check_imports()
    keys = home.keys
    tls = TlsFiles(keys / "ca.crt", keys / "tls.crt", keys / "tls.key")
    nodes = Journal(home.path / "nodes.jsonl")

    def register(_domain: str, node_key: bytes) -> str:
        key = f"node/{sha256_bytes(node_key)}"
        known = nodes.get(key)
        if known is None:
            known = {"node_id": str(register_node(home, node_key))}
            nodes.put(key, known)
        return str(known["node_id"])

    enroller = Enroller(
        home.members,
        home.invitations,
        CertificateAuthority(keys / "ca.crt", keys / "ca.key"),
        home.identity.public,
        register,
    )
    intake = Intake(home.store, home.ledger, home.members, home.identity)
    ports, bind = home.config.ports, home.config.bind
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    with (
        serve_exchange(intake, home, home.identity.public, f"{bind}:{ports.exchange}", tls),
        serve_enrolment(enroller, f"{bind}:{ports.enrol}", tls),
    ):
        ended.wait()
