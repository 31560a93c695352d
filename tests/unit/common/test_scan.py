"""The canary scanner finds each encoding that is planted, nothing in clean bytes, and misses what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from leaks import IDS, MISSED_IDS, MISSED_TEXTS, TEXTS
from typer.testing import CliRunner

from common.audit.cli import app
from common.audit.scan import DEPTH, MISSES, Scan, Scanner, needles, read_canaries
from common.errors import ConfigError

USER = "quokka-7f3a91"  # a text, and a number that is not a multiple of anything in the capture
HISTORY = [212, 17, 230, 44, 101, 9, 151, 66, 203, 88]
OTHERS = ["wombat-000001", "numbat-000002", [5, 3, 8, 13, 99, 1, 7, 2, 4, 6]]
NOISE = np.random.default_rng(0).bytes(4096)


def scan(data: bytes, *canaries: object) -> Scan:
    found = Scan()
    Scanner([*canaries, *OTHERS]).add(found, "stream", data)
    return found


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("shift", [0, 3])
def test_a_text_is_found_in_each_encoding_amid_noise(name: str, shift: int) -> None:
    leak = TEXTS[name](USER.encode())
    assert scan(NOISE[shift:] + leak + NOISE, USER).found == {0}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("shift", [0, 3])
def test_a_sequence_of_ids_is_found_in_each_encoding_amid_noise(name: str, shift: int) -> None:
    assert scan(NOISE[shift:] + IDS[name](HISTORY) + NOISE, HISTORY).found == {0}


@pytest.mark.parametrize("name", MISSED_TEXTS)
def test_expected_misses_of_texts(name: str) -> None:
    """Not found, and said so in every report: whoever makes one of these found updates `MISSES`."""
    assert scan(NOISE + MISSED_TEXTS[name](USER.encode()) + NOISE, USER).found == set()


@pytest.mark.parametrize("name", MISSED_IDS)
def test_expected_misses_of_ids(name: str) -> None:
    assert scan(NOISE + MISSED_IDS[name](HISTORY) + NOISE, HISTORY).found == set()


def test_misses_are_named() -> None:
    for word in ("raw deflate", "XOR", "low bits", "rescaled", "hash", "split"):
        assert word in MISSES


def test_non_ascii_texts_are_found() -> None:
    user = "küchenkönig-ß7"
    for data in (user.encode(), user.encode("utf-16-be"), b'"k\\u00fcchenk\\u00f6nig-\\u00df7"'):
        assert scan(NOISE + data + NOISE, user).found == {0}


def test_nothing_is_found_in_clean_bytes() -> None:
    rng = np.random.default_rng(1)
    tensors = rng.normal(0, 0.02, 1 << 17).astype(np.float32).tobytes()
    clean = [rng.bytes(1 << 19), tensors, bytes(1 << 16), bytes(range(256)) * 64]
    clean += [TEXTS[name](b"somebody else entirely") for name in TEXTS]
    clean += [IDS[name]([3, 1, 4, 1, 5, 9, 2, 6, 5, 35]) for name in IDS]
    canaries = [f"quokka-{number:06x}" for number in range(60)]
    histories = [rng.permutation(250)[:10].tolist() for _ in range(60)]
    found = scan(b"".join(clean), *canaries, *histories)
    assert found.hits == [] and found.cut == []
    assert found.searched_bytes > sum(map(len, clean))


def test_nesting_is_undone_to_its_depth_and_no_further() -> None:
    leak = USER.encode()
    for _ in range(DEPTH):
        leak = TEXTS["bz2"](leak)
    assert scan(NOISE + leak, USER).found == {0}
    assert scan(NOISE + TEXTS["bz2"](leak), USER).found == set()


def test_a_hit_says_what_was_undone_and_where() -> None:
    leak = TEXTS["gzip of base64 of zlib"](USER.encode())
    (hit,) = [hit for hit in scan(leak, USER).hits if hit.undone == ("gzip", "base64", "zlib")]
    assert (hit.canary, hit.form, hit.place) == (0, "utf-8", "stream, exchange 0, bytes")


def test_what_is_too_short_is_not_looked_for() -> None:
    assert needles("short") == {} or all(len(needle) >= 8 for needle in needles("short"))
    assert needles([1, 2, 3]) == {}
    assert "varint" not in needles([1, 2, 3, 4]).values()  # four bytes
    assert "<i4" in needles([1, 2, 3, 4]).values()
    assert "<i2" not in needles([70_000, 2, 3, 4]).values()  # does not fit


def test_canaries_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "canaries.txt"
    path.write_text("quokka-7f3a91\n\n12, 7,300,4\nrare word\n")
    assert read_canaries(path) == ["quokka-7f3a91", [12, 7, 300, 4], "rare word"]
    for text, what in (("", "no canary"), ("abc\n", ":1: too short"), ("quokka-7f3a91\n1,2\n", ":2: ")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=what):
            read_canaries(path)


def test_the_command_finds_a_leak_and_says_what_it_would_miss(tmp_path: Path) -> None:
    capture = tmp_path / "capture"
    capture.mkdir()
    (capture / "clean.up").write_bytes(NOISE)
    canaries = tmp_path / "canaries.txt"
    canaries.write_text("wombat-1f00aa\n212,17,230,44,101,9,151,66,203,88\n")
    arguments = ["scan", str(capture), "--canaries", str(canaries)]
    clean = CliRunner().invoke(app, arguments)
    assert clean.exit_code == 0, clean.output
    assert "none of 2 canaries found" in clean.output and "raw deflate" in clean.output
    (capture / "leak.up").write_bytes(NOISE + IDS["parquet list"](HISTORY))
    leak = CliRunner().invoke(app, arguments)
    assert leak.exit_code == 1
    assert "canary 2" in leak.output and "canary 1" not in leak.output and "leak.up" in leak.output
    assert "212" not in leak.output  # a canary is private: it is named by its number
    with pytest.raises(ConfigError, match="no captured stream"):
        Scanner(OTHERS).scan(tmp_path / "none")


def test_a_canary_across_blocks_or_at_the_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.audit.scan._Search._BLOCK", 64)
    for before in range(130):
        assert scan(NOISE[:before] + USER.encode(), USER).found == {0}
        assert scan(NOISE[:before] + USER.encode() + NOISE[:9], USER).found == {0}
