"""Orders: signed, for one recipient, of one schema; names in them can become file names safely."""

import json
from typing import Any

import pytest

from common.config import RunConfig
from common.errors import ConfigError, IsthmusError, ParcelError, SignatureError
from common.orders import EVALUATE, PAYLOAD_TYPE, Candidate, Order
from common.signing import SigningKey, seal

KEY = SigningKey(bytes(range(32)))
CONFIG = RunConfig.model_validate({"run": {"name": "demo"}})
CANDIDATE = Candidate("mergerec-layer", "a" * 64, "")
STATEMENT: dict[str, Any] = {
    "action": EVALUATE,
    "run": "demo-0",
    "recipient": "toys",
    "config": json.dumps(CONFIG.model_dump(mode="json")),
    "base_digest": "b" * 64,
    "candidates": [{"label": "mergerec-layer", "parcel": "a" * 64, "model_digest": ""}],
    "generation": 0,
}


def opened(changes: dict[str, Any] | None = None, *, without: str = "") -> Order:
    statement = {name: value for name, value in {**STATEMENT, **(changes or {})}.items() if name != without}
    return Order.open(seal(statement, KEY, payload_type=PAYLOAD_TYPE), KEY.public, "toys")


def candidates(**changes: Any) -> dict[str, Any]:
    return {"candidates": [{**STATEMENT["candidates"][0], **changes}]}


def test_there_and_back() -> None:
    order = Order(EVALUATE, "demo-0", "toys", CONFIG, "b" * 64, (CANDIDATE,))
    envelope = order.sign(KEY)
    assert Order.open(envelope, KEY.public, "toys") == order == opened()
    assert order.sign(KEY) == envelope  # the same order asked twice is the same bytes
    assert order.round == 1


def test_no_path_of_the_servers_crosses() -> None:
    options = {"fitness": "scoring", "samples": "/srv/private/samples.jsonl", "samples_sha256": "c" * 64}
    data = {
        "base": {"model": "/srv/private/models/qwen"},
        "merge": [{"method": "evo-merging", "options": options}],
        "lora": {},
        "instruction": {},
    }
    envelope = Order(EVALUATE, "r", "toys", RunConfig.model_validate(data), "b" * 64).sign(KEY)
    found = Order.open(envelope, KEY.public, "toys").config
    assert found.base.model == "qwen"
    assert found.merge[0].options == {"fitness": "scoring", "samples_sha256": "c" * 64}


def test_another_key() -> None:
    envelope = Order(EVALUATE, "r", "toys", CONFIG, "b" * 64).sign(SigningKey(bytes(32)))
    with pytest.raises(SignatureError):
        Order.open(envelope, KEY.public, "toys")


def test_a_changed_byte_and_another_payload_type() -> None:
    envelope = Order(EVALUATE, "r", "toys", CONFIG, "b" * 64).sign(KEY)
    sealed = json.loads(envelope)
    sealed["payload"] = sealed["payload"][:-8] + "AAAAAAA="
    for wrong in (json.dumps(sealed).encode(), seal(STATEMENT, KEY, payload_type="application/json")):
        with pytest.raises(ParcelError):
            Order.open(wrong, KEY.public, "toys")


@pytest.mark.parametrize("field", sorted(STATEMENT))
def test_a_missing_field(field: str) -> None:
    with pytest.raises(ParcelError):
        opened(without=field)


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"action": "delete"},
        {"action": 3},
        {"recipient": "books"},
        {"run": "../../books"},
        {"run": "/etc"},
        {"run": ""},
        {"base_digest": "short"},
        {"config": "not json"},
        {"config": 5},
        {"candidates": "none"},
        {"candidates": [5]},
        candidates(label="../../../data"),
        candidates(label="zero-shot"),
        candidates(label="ties/.."),
        candidates(parcel="../x"),
        candidates(model_digest="x"),
        candidates(path="/etc"),
        {"candidates": STATEMENT["candidates"] * 2},
        {"generation": 1},
        {"action": "score", "generation": -1},
        {"action": "score", "generation": True},
        {"action": "score", "generation": 10_000},
        {"action": "receive", **candidates(label="../../../data")},
    ],
)
def test_what_is_not_an_order(changes: dict[str, Any]) -> None:
    with pytest.raises(ParcelError):
        opened(changes)


def test_orders_about_candidates() -> None:
    assert opened({"action": "receive", **candidates(label="domain-1f2e3d")}).round == 4
    score = opened({"action": "score", "generation": 7})
    assert (score.round, score.key.rpartition("/")[2]) == (12, "7")


def test_a_label_that_the_configuration_makes_unsafe() -> None:
    merge = [{"method": "mergerec", "options": {"granularity": "x/../../../data"}}]
    label = "mergerec-x/../../../data"
    with pytest.raises(IsthmusError):
        opened({"config": json.dumps({"merge": merge, "publish": label}), **candidates(label=label)})


def test_a_configuration_with_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match="the run's configuration"):
        opened({"config": '{"training": {"data_path": "/etc"}}'})
