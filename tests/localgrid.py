"""A whole federation in this process: real homes, keys, TLS and gRPC; only Flower and the trainer's process
are stood in for.

`LocalFederation` makes a server's home, serves Exchange and Enrolment on loopback, and lets every owner
join with a real kit. `LocalGrid` is the part of Flower's Grid that a run uses: it hands each message to
the owner's runner code (`clients.runner.handle`), which calls the installed ClientApp.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest import mock

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity

from clients import runner
from clients.app import HOME_VARIABLE
from clients.home import ClientHome
from clients.join import join
from clients.policy import EgressPolicy
from clients.training.job import Job
from clients.training.perform import perform
from common.config import RunConfig
from common.kit import read_kit
from common.parcels import Kind
from common.processes import free_ports
from common.progress import NO_REPORT
from common.tls import CertificateAuthority, TlsFiles
from common.wire.serving import Serving
from server.cli import create_home, create_run
from server.enrolment import Enroller
from server.exchange import serve, serve_enrolment
from server.home import ServerHome
from server.intake import Intake
from server.kit import write_kit
from server.runs import Run
from server.superlink import fab_sha256

PORTS = ("fleet", "exchange", "enrol", "superlink")
UNREACHABLE = 5  # the code of an error that Flower makes for a node that is gone


class KilledError(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def pico_run_config(base: Path, **run: Any) -> RunConfig:
    """Two steps of training, one plain and one learned merge."""
    return RunConfig.model_validate(
        {
            "run": {"name": "pico", **run},
            "base": {"model": str(base)},
            "text": {"max_seq_len": 32},
            "training": {
                "batch_size": 8, "max_steps": 2, "warmup_steps": 1, "learning_rate": 1e-3,
                "eval_every_steps": 2, "checkpoint_every_steps": 2, "precision": "fp32",
            },
            "learning": {"steps": 2, "batch_size": 4, "precision": "fp32"},
            "merge": [
                {"method": "task-arithmetic"},
                {"method": "mergerec", "options": {"granularity": "domain"}},
            ],
            "publish": "mergerec-domain",
        }
    )  # fmt: skip


@dataclass
class LocalTask:
    """What `clients.flower.Task` is, without a SuperNode."""

    message: Message
    context: Context
    fab_sha256: str
    answer: Message | None = None

    def reply(self, message: Message) -> None:
        self.answer = message

    def close(self) -> None:
        """Nothing is held."""


Intercept = Callable[[str, str, Message], Message | None]


@dataclass
class LocalGrid:
    """Delivers messages to `owners` (node id to home). `intercept(domain, action, message)` may answer or
    raise in their place; `asked` and `replies` tell what crossed."""

    owners: dict[int, Path]
    fab: str
    intercept: Intercept | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)
    replies: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    _waiting: dict[str, Message] = field(default_factory=dict)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            name = f"m{len(self.asked)}"
            message.metadata.__dict__["_message_id"] = name
            self._waiting[name] = message
            self.asked.append((self._domain(message), _action(message)))
            pushed.append(name)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for name in message_ids:
            message = self._waiting.pop(name, None)
            if message is not None:
                yield self._deliver(message)

    def _domain(self, message: Message) -> str:
        return self.owners[message.metadata.dst_node_id].name

    def _deliver(self, message: Message) -> Message:
        domain, action = self._domain(message), _action(message)
        answer = self.intercept(domain, action, message) if self.intercept else None
        answer = answer or call_owner(self.owners[message.metadata.dst_node_id], message, self.fab)
        if not answer.has_error():
            self.replies.append((domain, action, dict(answer.content.config_records["reply"])))
        return answer


def _action(message: Message) -> str:
    return message.metadata.message_type.partition(".")[2]


def call_owner(path: Path, message: Message, fab: str) -> Message:
    """What the owner's runner does with `message`; an error message when it did not answer."""
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    task = LocalTask(message, context, fab)
    with mock.patch.dict(os.environ, {HOME_VARIABLE: str(path)}):
        runner.handle(task, ClientHome(path))  # type: ignore[arg-type]
    return task.answer or unreachable(message)


def unreachable(message: Message) -> Message:
    """What Flower says of a node that does not answer."""
    return Message(Error(UNREACHABLE, "node unavailable"), reply_to=message)


def dying(target: Callable[..., Any], *, after: bool = False, call: int = 1) -> Callable[..., Any]:
    """`target`, but its `call`-th call (and no later one) raises KilledError before or after the work."""
    calls = []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) != call:
            return target(*arguments, **options)
        if after:
            target(*arguments, **options)
        raise KilledError

    return wrapped


def resolve(name: str) -> Any:
    """The object that `monkeypatch.setattr(name, ...)` would replace."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return getattr(resolve(module), attribute)


class LocalFederation:
    """A server and one owner for each of `domains`, under `folder`. A context manager: it serves inside."""

    def __init__(
        self,
        folder: Path,
        base: Path,
        make_domain: Callable[..., Any],
        domains: Iterable[str] = ("toys", "books"),
        *,
        policies: dict[str, EgressPolicy] | None = None,
    ) -> None:
        self.folder, self.base, self._make_domain = folder, base, make_domain
        self.domains = tuple(sorted(domains))
        self.policies = policies or {}
        self.jobs: list[tuple[str, str]] = []  # (domain, mode) of every job that was begun
        self.fits_done: list[str] = []
        self.fab = fab_sha256()
        self._stack = ExitStack()
        self.exchange: Serving | None = None
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        home = {"name": "pico", "hosts": ["127.0.0.1"], "bind": "127.0.0.1", "ports": ports}
        self.server_path = create_home(folder / "server", home).path

    def __enter__(self) -> Self:
        home = self.server()
        self.serve_exchange()
        authority = CertificateAuthority(home.keys / "ca.crt", home.keys / "ca.key")
        nodes = defaultdict(lambda: "99", {domain: str(n) for n, domain in enumerate(self.domains, 1)})
        enroller = Enroller(
            home.members, home.invitations, authority, home.identity.public, lambda d, _key: nodes[d]
        )
        enrol = f"127.0.0.1:{home.config.ports.enrol}"
        self._stack.enter_context(serve_enrolment(enroller, enrol, _tls(home)))
        self._stack.enter_context(mock.patch("clients.actions.run_job", self._run_job))
        identity = {"_run_id": 1, "_node_id": 1, "_task_id": 1}  # Flower sets them in a ServerApp's process
        self._stack.enter_context(mock.patch.multiple(TaskIdentity, **identity))
        for domain in self.domains:
            self._join(home, domain)
        return self

    def serve_exchange(self) -> None:
        """The data channel, by a new process of the server if one was there before."""
        if self.exchange is not None:
            self.exchange.stop(0)
        home = self.server()
        intake = Intake(home.store, home.ledger, home.members, home.identity)
        address = f"127.0.0.1:{home.config.ports.exchange}"
        self.exchange = serve(intake, home, home.identity.public, address, _tls(home))
        self._stack.callback(self.exchange.stop, 0)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def server(self) -> ServerHome:
        """The server's home as a new process sees it: nothing in memory."""
        return ServerHome(self.server_path)

    def path(self, domain: str) -> Path:
        return self.folder / "domains" / domain

    def owner(self, domain: str) -> ClientHome:
        """An owner's home as a new process sees it."""
        return ClientHome(self.path(domain))

    def run(self, **run: Any) -> Run:
        return create_run(self.server(), pico_run_config(self.base, **run))

    def grid(self, intercept: Intercept | None = None) -> LocalGrid:
        owners = {number: self.path(domain) for number, domain in enumerate(self.domains, 1)}
        return LocalGrid(owners, self.fab, intercept)

    def killed_after(self, action: str) -> Intercept:
        """The owner has done `action`, but its reply is lost with the server."""

        def intercept(domain: str, asked: str, message: Message) -> None:
            if asked == action:
                call_owner(self.path(domain), message, self.fab)
                raise KilledError

        return intercept

    def delivered(self, run: Run) -> list[tuple[str, int, str]]:
        """(domain, round, kind) of every admitted parcel, sorted."""
        found = self.server().store.find(run=run.spec.run_id)
        return sorted((stored.sender, stored.round, str(stored.kind)) for stored in found)

    def published(self, run: Run, kind: Kind = Kind.UNIVERSAL_MODEL) -> set[str]:
        """Payload digests of what the server published."""
        found = self.server().store.find(direction="out", run=run.spec.run_id, kind=kind)
        return {stored.payload_digest for stored in found}

    def _join(self, home: ServerHome, domain: str) -> None:
        data = self.folder / "data" / domain
        self._make_domain(domain, users=60, seed=self.domains.index(domain)).save(data)
        kit = self.folder / f"{domain}.kit.json"
        write_kit(home, domain, kit)
        join(
            read_kit(kit),
            self.path(domain),
            data=data,
            base=str(self.base),
            supernode_port=19094,
            policy=self.policies.get(domain),
        )

    def _run_job(self, job: Job) -> dict[str, Any]:
        domain = Path(job.domain).name
        self.jobs.append((domain, job.mode))
        result = json.loads(json.dumps(perform(job, NO_REPORT)))
        if job.mode == "fit":
            self.fits_done.append(domain)
        return {**result, "isolated": False}


def _tls(home: ServerHome) -> TlsFiles:
    return TlsFiles(home.keys / "ca.crt", home.keys / "tls.crt", home.keys / "tls.key")
