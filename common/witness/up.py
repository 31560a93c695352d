"""`isthmus witness up`: serve until told to stop."""

from __future__ import annotations

import signal
import threading

import grpc

from common.wire import exchange_pb2_grpc as rpc
from common.wire.serving import Serving, start
from common.witness.home import WitnessHome
from common.witness.service import WitnessService


def serve(home: WitnessHome) -> Serving:
    """Start the service; TLS without client certificates. Raises FederationError if the port is in use."""
    service = WitnessService(home.cosigner, home.find_log, home.update_root)
    pair = (home.tls.key.read_bytes(), home.tls.certificate.read_bytes())
    credentials = grpc.ssl_server_credentials([pair])
    address = f"{home.config.bind}:{home.config.port}"
    return start([(service, rpc.add_WitnessServicer_to_server)], address, credentials)


def up(home: WitnessHome) -> None:
    """Serve until SIGINT or SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    with serve(home):
        ended.wait()
