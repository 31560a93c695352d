"""The merged folder while it is made: `.NAME.merging` beside the output folder, renamed to it at the end.

Weights are written in place, tensor by tensor. Every `CHECKPOINT_BYTES` they are flushed to the disk, and
the journal beside the staging folder, `.NAME.merging.jsonl`, says how many tensors are done: an interrupted
merge of the same inputs goes on from there. The journal's first line is the key of these inputs; with any
other key the staging folder is begun anew. A merge that fails leaves nothing; one that is killed leaves
staging folder and journal. Whatever the output folder held before stays until the new one takes its place.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import ConfigError, StorageError
from common.files import replace_folder, restore_folder, storage_errors, write_all
from server.folders import ModelFolder

CHECKPOINT_BYTES = 256 << 20
_OURS = ("config.json", "modules.json", "adapter_config.json", "merge.json")
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".py"}
_NOT_COPIED = {"README.md", "merge.json", "trainer_state.json", "training_args.json"}
_KEPT_NAMES = ("LICENSE", "NOTICE")


class Staging:
    """The folder under construction. As a context manager it holds a lock on the output's name.

    `done_tensors` and `state` are what the journal of an interrupted merge with the same `key` says (0 and
    an empty dict else). Raises ConfigError where the output folder exists and `force` is not given, or where
    another process is merging to it; StorageError where the disk is full.
    """

    def __init__(self, out: Path, key: str, *, force: bool) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.merging")
        self.work = self.folder / ".work"  # for whoever keeps progress of its own; not in the result
        self._journal_path = out.with_name(f".{out.name}.merging.jsonl")
        self._key = key
        self._journal = -1
        self.done_tensors = 0
        self.state: dict[str, Any] = {}
        _check_out(out, force=force)

    def __enter__(self) -> Staging:
        with storage_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._journal)
                raise ConfigError(
                    f"{self.out}: another merge is writing it",
                    next_step="wait for it, or choose another folder",
                ) from None
            self._resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception):  # Ctrl-C keeps what is done
            shutil.rmtree(self.folder, ignore_errors=True)
            self._journal_path.unlink(missing_ok=True)
        os.close(self._journal)

    def checkpoint(self, done_tensors: int, state: Mapping[str, Any]) -> None:
        """Say in the journal that the first `done_tensors` tensors are in the (flushed) files."""
        line = json.dumps({"tensors": done_tensors, "state": state}) + "\n"
        with storage_errors(self._journal_path):
            write_all(self._journal, line.encode("ascii"))
            os.fsync(self._journal)

    def publish(self, *, durable: bool) -> None:
        """Put the folder in the place of the output folder; `durable`: and flush that to the disk."""
        shutil.rmtree(self.work, ignore_errors=True)
        replace_folder(self.folder, self.out, durable=durable)

    def _resume(self) -> None:
        lines = _read_lines(self._journal_path)
        if lines and lines[0].get("key") == self._key and self.folder.is_dir():
            if len(lines) > 1:
                self.done_tensors, self.state = int(lines[-1]["tensors"]), dict(lines[-1]["state"])
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        os.ftruncate(self._journal, 0)
        write_all(self._journal, (json.dumps({"key": self._key}) + "\n").encode("ascii"))


def copy_companions(base: ModelFolder, folder: Path, dtype: str | None) -> None:
    """Copy configuration, tokenizer and sentence-transformers files of the base.

    dtype: what `config.json` shall say the weights are ("float32", "bfloat16"), None leaves it.
    """
    with storage_errors(folder):
        for module in ("", *base.modules):
            (folder / module).mkdir(parents=True, exist_ok=True)
            if not (base.path / module).is_dir():
                continue  # a module without files (Normalize) may have lost its empty folder on the way
            for path in sorted((base.path / module).iterdir()):
                if path.is_file() and _is_companion(path.name):
                    (folder / module / path.name).write_bytes(path.read_bytes())
        if dtype is not None and base.config:
            config = {**base.config, "dtype": dtype}
            config.pop("torch_dtype", None)
            (folder / base.config_file).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_space(out: Path, wanted_bytes: int) -> None:
    """Raises StorageError where the disk cannot take the result."""
    found = os.statvfs(out.parent)
    free = found.f_bavail * found.f_frsize
    if free < wanted_bytes:
        raise StorageError(
            f"{out}: the disk has {free} bytes free, the result takes {wanted_bytes}",
            next_step="free space on that disk or choose another folder",
        )


def _is_companion(name: str) -> bool:
    if name in _NOT_COPIED or name.endswith(".index.json") or name.startswith("."):
        return False
    return Path(name).suffix in _COPIED or name.startswith(_KEPT_NAMES)


def _check_out(out: Path, *, force: bool) -> None:
    restore_folder(out)
    if not out.exists():
        return
    if not force:
        raise ConfigError(f"{out}: exists already", next_step="choose another folder, or give --force")
    is_model = out.is_dir() and (any((out / name).is_file() for name in _OURS) or not any(out.iterdir()))
    if not is_model:
        raise ConfigError(
            f"{out}: is not a model folder, so --force does not replace it", next_step="choose another folder"
        )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a line that was cut off ends it."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="ascii", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines
