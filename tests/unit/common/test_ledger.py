"""Append-only logs: shared, chained, repaired only where a crash explains the damage."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import LedgerError, StorageError
from common.ledger import NO_ENTRY, AppendOnlyLog, Crossing, Journal, Ledger
from common.merkle import leaf_hash, verify_consistency, verify_inclusion

CROSSING = Crossing("out", "data", "parcel", "a" * 64, 10, "server", "catalog", "demo")


def _log(path: Path, entries: int = 3) -> AppendOnlyLog:
    log = AppendOnlyLog(path)
    for number in range(entries):
        log.append({"number": number})
    return log


def test_chain_and_reopening(tmp_path: Path) -> None:
    log = _log(tmp_path / "log")
    again = AppendOnlyLog(tmp_path / "log")
    assert [entry.body["number"] for entry in again] == [0, 1, 2]
    assert again.last_digest == log.last_digest == log[2].digest
    assert log[0].prev == NO_ENTRY
    assert log[2].prev == log[1].digest


def test_two_writers_see_each_other(tmp_path: Path) -> None:
    one, two = AppendOnlyLog(tmp_path / "log"), AppendOnlyLog(tmp_path / "log")
    one.append({"from": 1})
    assert two.append({"from": 2}).index == 1
    one.refresh()
    assert [entry.body["from"] for entry in one] == [1, 2]


def test_threads_and_instances_interleave(tmp_path: Path) -> None:
    logs = [AppendOnlyLog(tmp_path / "log") for _ in range(3)]
    threads = [
        threading.Thread(target=lambda log=log: [log.append({"n": n}) for n in range(15)])
        for log in logs
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(AppendOnlyLog(tmp_path / "log")) == 90


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_torn_tail_is_removed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log"
    _log(path)
    os.truncate(path, path.stat().st_size - cut)
    log = AppendOnlyLog(path)
    assert len(log) == 2
    assert log.append({"number": 9}).index == 2
    assert len(AppendOnlyLog(path)) == 3


@pytest.mark.parametrize("damage", ["edit", "drop", "swap", "insert"])
def test_damage_elsewhere_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "log"
    _log(path)
    lines = path.read_bytes().splitlines(keepends=True)
    changed = {
        "edit": [lines[0], lines[1].replace(b'"number":1', b'"number":7'), lines[2]],
        "drop": [lines[0], lines[2]],
        "swap": [lines[0], lines[2], lines[1]],
        "insert": [lines[0], lines[0], lines[1]],
    }[damage]
    path.write_bytes(b"".join(changed))
    with pytest.raises(LedgerError, match=r"line [23] \(index [12]\)"):
        AppendOnlyLog(path)


def test_shrinking_while_open_is_fatal(tmp_path: Path) -> None:
    log = _log(tmp_path / "log")
    os.truncate(tmp_path / "log", 0)
    with pytest.raises(LedgerError, match="shorter"):
        log.append({})


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    log = _log(tmp_path / "log")
    before = (tmp_path / "log").read_bytes()

    def full(descriptor: int, *data: bytes) -> int:
        if data:
            os_write(descriptor, data[0][:20])
        raise OSError(errno.ENOSPC, "full")

    os_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match="log: cannot write"):
            log.append({"number": 3})
    assert (tmp_path / "log").read_bytes() == before
    assert log.append({"number": 3}).index == 3


def test_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from common.ledger import AppendOnlyLog
        log = AppendOnlyLog(Path(sys.argv[1]))
        while True:
            print(log.append({"filler": "x" * 500}).index, flush=True)
    """
    acknowledged = -1
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "log")],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for _ in range(20):
                acknowledged = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split("\n")[:-1]
        acknowledged = int(rest[-1]) if rest else acknowledged
        assert len(AppendOnlyLog(tmp_path / "log")) > acknowledged
    assert acknowledged >= 59


def test_ledger_records_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first = ledger.record_once(CROSSING)
    assert Ledger(tmp_path / "ledger.jsonl").record_once(CROSSING) == first
    assert ledger.record(CROSSING).index == 1
    assert first.body["time_s"] > 1_600_000_000


def test_journal(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path / "journal.jsonl"), Journal(tmp_path / "journal.jsonl")
    journal.put("run/b", {"loss": 0.5, "none": None})
    journal.put("run/a", {"n": [1, {"x": 2}]})
    journal.put("run/a", {"n": [1, {"x": 2}]})
    assert other.get("run/b") == {"loss": 0.5, "none": None}
    other.put("run/b", {"loss": 0.25})
    assert journal.items("run/") == [("run/a", {"n": [1, {"x": 2}]}), ("run/b", {"loss": 0.25})]
    assert len((tmp_path / "journal.jsonl").read_bytes().splitlines()) == 3
    with pytest.raises(LedgerError):
        journal.put("nan", {"loss": float("nan")})
    with pytest.raises(LedgerError):
        journal.put("käse", {})


def test_a_ledger_is_a_tree_that_only_grows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    heads = [ledger.tree_head()]
    for number in range(5):
        ledger.record(replace(CROSSING, digest=f"{number:064x}", time_s=1))
        heads.append(ledger.tree_head())
    again = Ledger(tmp_path / "ledger.jsonl")
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines()
    for size, head in enumerate(heads):
        root = bytes.fromhex(head.root)
        assert again.tree_head(size) == head
        verify_consistency(size, 5, again.consistency(size, 5), root, bytes.fromhex(heads[5].root))
        for index in range(size):
            verify_inclusion(index, size, leaf_hash(lines[index]), again.inclusion(index, size), root)


def test_an_edit_that_repairs_the_chain_still_changes_the_root(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for number in range(3):
        ledger.record(replace(CROSSING, digest=f"{number:064x}", time_s=1))
    head = ledger.tree_head()
    entries = list(ledger)
    path.unlink()
    forged = Ledger(path)
    for entry in entries:
        forged.append({**entry.body, "size_bytes": 11} if entry.index == 1 else entry.body)
    assert forged.tree_head().size == head.size
    assert forged.tree_head().root != head.root
