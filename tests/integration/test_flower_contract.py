"""What we use of Flower's private API is there, with the names and arguments that we use."""

import hashlib
import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr.supernode.runtime.run_clientapp as run_clientapp
import pytest
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse, PushTaskOutputRequest
from flwr.supercore.cli.flower_superexec import _parse_args as superexec_arguments
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from clients import flower
from clients.flower import ACQUIRE, TaskSource
from clients.up import specs
from common.flower import RUN_KEY
from server.cli import create_home
from server.superlink import fab_folder, superexec_spec, superlink_spec

ROOT = Path(__file__).parents[2]


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_installed_version_is_in_our_range() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "flwr"]
    assert wanted.specifier.contains(version("flwr"))
    assert not wanted.specifier.contains("1.39.0")
    assert not wanted.specifier.contains("2.0")


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (run_clientapp.pull_task_input, ["client"]),
        (run_clientapp.push_message, ["client", "message", "context"]),
        (HeartbeatSender.__init__, ["heartbeat_fn"]),
        (HeartbeatSender.start, []),
        (HeartbeatSender.stop, []),
        (make_simple_http_retry_invoker, []),
        (RuntimeVersionHttpInterceptor.__init__, ["component_name"]),
        (RuntimeTokenHttpInterceptor.__init__, ["token"]),
        (SuperExecAuthHttpInterceptor.__init__, ["master_secret", "protected_methods"]),
        (RuntimeHttpClient.AcquireTask, ["request"]),
        (RuntimeHttpClient.PushTaskOutput, ["request"]),
        (RuntimeHttpClient.close, []),
    ],
)
def test_signatures(function: Any, names: list[str]) -> None:
    assert parameters(function) == names


def test_the_rest_of_what_we_call() -> None:
    connect = inspect.signature(RuntimeHttpClient.from_server_address).parameters
    assert {"server_address", "insecure", "root_certificates", "interceptors", "retry_invoker"} == set(
        connect
    )
    assert isinstance(HeartbeatSender.is_running, property)
    assert ACQUIRE in inspect.getsource(RuntimeHttpClient.AcquireTask)
    assert TaskType.CLIENT_APP == "flwr-clientapp"
    assert SubStatus.COMPLETED
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP], agentapp_fab_hashes=[])
    assert list(request.supported_task_types) == ["flwr-clientapp"]
    assert set(AcquireTaskResponse.DESCRIPTOR.fields_by_name) >= {"task", "token"}
    assert set(PushTaskOutputRequest.DESCRIPTOR.fields_by_name) >= {"context", "sub_status", "details"}


class _Client:
    """A SuperNode's Runtime API with at most one task."""

    def __init__(self, task: bool) -> None:
        self.task, self.closed = task, False

    def AcquireTask(self, _request: AcquireTaskRequest) -> AcquireTaskResponse:  # noqa: N802
        response = AcquireTaskResponse()
        if self.task:
            response.task.SetInParent()
            response.token = "token"
        return response

    def close(self) -> None:
        self.closed = True


def _source(monkeypatch: pytest.MonkeyPatch, *, task: bool) -> tuple[TaskSource, list[_Client]]:
    clients: list[_Client] = []

    def connect(_self: TaskSource, _interceptors: Any) -> _Client:
        clients.append(_Client(task))
        return clients[-1]

    monkeypatch.setattr(TaskSource, "_connect", connect)
    monkeypatch.setattr(flower, "_beat", lambda _client: lambda: True)
    return TaskSource("127.0.0.1:1", b"s" * 32), clients


def test_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    source, clients = _source(monkeypatch, task=False)
    assert source.acquire() is None
    assert len(clients) == 1
    source.close()
    assert clients[0].closed


def test_a_task_is_known_by_the_hash_of_its_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    source, clients = _source(monkeypatch, task=True)
    fab = SimpleNamespace(content=b"bundle", hash_str="what the server claims")
    monkeypatch.setattr(flower, "pull_task_input", lambda _client: ("message", "context", "run", fab))
    task = source.acquire()
    assert task is not None
    assert task.fab_sha256 == hashlib.sha256(b"bundle").hexdigest()
    assert task.message == "message"
    assert task._heartbeat.is_running
    task.close()
    assert not task._heartbeat.is_running
    assert clients[1].closed


def test_a_task_that_cannot_be_pulled_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    source, clients = _source(monkeypatch, task=True)
    senders: list[HeartbeatSender] = []

    class Sender(HeartbeatSender):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            senders.append(self)

    def broken(_client: Any) -> Any:
        raise RuntimeError("No messages received from Runtime API")

    monkeypatch.setattr(flower, "HeartbeatSender", Sender)
    monkeypatch.setattr(flower, "pull_task_input", broken)
    with pytest.raises(RuntimeError):
        source.acquire()
    assert clients[1].closed
    assert not senders[0].is_running


def test_flowers_programs_know_our_options(tmp_path: Path) -> None:
    ports = {"fleet": 1, "exchange": 2, "enrol": 3, "superlink": 4}
    data = {"name": "lab", "hosts": ["127.0.0.1"], "bind": "127.0.0.1", "ports": ports}
    server = create_home(tmp_path / "server", data)
    address = SimpleNamespace(fleet="127.0.0.1:1")
    config = SimpleNamespace(domain="toys", supernode_port=5, server=address)
    owner = SimpleNamespace(path=tmp_path, keys=tmp_path, config=config)
    for parser, spec in (
        (_parse_args_run_superlink(), superlink_spec(server)),
        (superexec_arguments(), superexec_spec(server)),
        (_parse_args_run_supernode(), specs(owner, 6)[1]),  # type: ignore[arg-type]
    ):
        assert Path(spec.argv[1]).exists()
        found, unknown = parser.parse_known_args(list(spec.argv[2:]))
        assert unknown == []
        assert getattr(found, "isolation", "process") == "process"


def test_the_bundle_declares_the_key_that_a_run_is_started_with() -> None:
    bundle = tomllib.loads((fab_folder() / "pyproject.toml").read_text())
    assert RUN_KEY in bundle["tool"]["flwr"]["app"]["config"]
