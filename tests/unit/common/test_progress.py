"""Progress: one small status file, replaced whole, with the seconds left."""

from pathlib import Path

from common.progress import NO_REPORT, StatusFile, read_status


class _Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_newest_state_with_the_seconds_left(tmp_path: Path) -> None:
    clock, path = _Clock(), tmp_path / "deep" / "status.json"
    report = StatusFile(path, clock, domain="toys")
    report(phase="train", step=10, total=50)
    clock.now_s += 10.0
    report(phase="train", step=20, total=50, loss=1.23456, bytes_sent=7)
    assert read_status(path) == {
        "domain": "toys", "phase": "train", "step": 20, "total": 50, "eta_s": 30.0, "loss": 1.2346,
        "bytes_sent": 7, "updated_s": 110.0,
    }  # fmt: skip


def test_few_writes_but_never_a_missing_phase_or_end(tmp_path: Path) -> None:
    clock, path = _Clock(), tmp_path / "status.json"
    report = StatusFile(path, clock)
    report(phase="train", step=1, total=9)
    report(phase="train", step=2, total=9)
    assert read_status(path)["step"] == 1
    report(phase="train", step=9, total=9)
    assert read_status(path)["step"] == 9
    report(phase="send", step=1, total=9)
    assert read_status(path)["phase"] == "send"
    assert read_status(path)["eta_s"] is None


def test_a_loss_belongs_to_its_phase(tmp_path: Path) -> None:
    report = StatusFile(tmp_path / "status.json")
    report(phase="train", step=1, total=2, loss=0.5, bytes_sent=3)
    report(phase="send", step=1, total=2)
    assert "loss" not in read_status(tmp_path / "status.json")
    assert read_status(tmp_path / "status.json")["bytes_sent"] == 3


def test_no_status_yet(tmp_path: Path) -> None:
    NO_REPORT(phase="anything", step=1)
    assert read_status(tmp_path / "none") == {}
    for damaged in ("", "[1]", '{"half'):
        (tmp_path / "status.json").write_text(damaged)
        assert read_status(tmp_path / "status.json") == {}
