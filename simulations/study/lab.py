"""The models of a study and the ranks that they give, each made once and kept on disk.

    out/seed-0/data/             prepared domains       out/seed-0/fits/      fine-tuned vectors
    out/seed-0/merges/<members>/ merged vectors         out/seed-0/ranks/     ranks of the test users

Interrupted anywhere, what is finished is read, and what was begun goes on where its own journal says.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from clients.data.domain import Domain
from clients.training.dataset import data_digest
from clients.training.evaluate import Split, draw_users, evaluate
from clients.training.fit import fine_tune, load_encoder
from common.config import RunConfig
from common.digests import json_digest, vector_digest
from common.models.base import load_tensors, model_digest, resolve_base, save_model, trainable_tensors
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector, apply, read_vector
from server.merge import MergeResult, run_merge
from simulations.arrays import kept
from simulations.config import SimulationConfig
from simulations.simulate import prepare_source
from simulations.study.tables import Cell, Member

Ranks = npt.NDArray[np.int64]
_README = "# A model of a study\n\nMade by Isthmus in a simulation, for evaluation.\n"


class Lab:
    """One seed of a study: `config.run.seed` draws the users and seeds fine-tuning and merging.

    `split` names the held-out item of a user that is sought.
    """

    def __init__(
        self, config: SimulationConfig, out: Path, report: Report = NO_REPORT, split: Split = "test"
    ) -> None:
        self._config = config
        self._split = split
        self._report = report
        self._folder = out / f"seed-{config.run.seed}"
        self.merged: dict[str, list[MergeResult]] = {}  # by row, without their vectors, in the order of cells
        self._domains: dict[str, Domain] = {}
        self._newest: tuple[object, TaskVector | None] = ("", None)

    def ranks(self, cell: Cell) -> Ranks:
        """The rank (1 = best) of the item of every user that is tested, in the order of the users: [U].

        Raises as fine-tuning, merging and evaluation do.
        """
        tau = self._vector_of(cell)
        domain = self.domain(cell.domain)
        key = {
            "base": self._base_digest,
            "vector": "" if tau is None else vector_digest(tau),
            "data": data_digest(domain, self._run.text),
            self._split: hashlib.sha256(np.ascontiguousarray(self.sought(cell.domain)).tobytes()).hexdigest(),
            "run": self._run.model_dump(mode="json", include={"base", "text", "evaluation"}),
            "precision": self._run.training.precision,
            "seed": self._run.run.seed,
        }
        path = self._folder / "ranks" / cell.domain / f"{json_digest(key)[:24]}.npy"
        return kept(path, lambda: self._evaluate(tau, domain))

    def tested(self, name: str) -> Ranks:
        """Which users of the domain `ranks` has, in its order: row numbers [U]."""
        users = len(self.domain(name).user_ids)
        return draw_users(users, self._run.evaluation.max_users, self._run.run.seed)

    def sought(self, name: str) -> npt.NDArray[np.int32]:
        """The held-out item of every user of the domain: row numbers of the catalog [U]."""
        domain = self.domain(name)
        return domain.valid if self._split == "valid" else domain.test

    def history_lengths(self, name: str) -> Ranks:
        """Items in the history of every user that is tested: [U]."""
        train = self.domain(name).train
        after = 0 if self._split == "valid" else 1  # before the test item comes the validation item
        return np.array([len(train[user]) + after for user in self.tested(name)])

    def domain(self, name: str) -> Domain:
        """The prepared domain."""
        if name not in self._domains:
            source = next(source for source in self._config.domain if source.name == name)
            key = json_digest(source.model_dump(mode="json"))[:12]  # another source is another folder
            self._domains[name] = Domain.load(prepare_source(self._config, name, self._folder / "data" / key))
        return self._domains[name]

    @cached_property
    def _run(self) -> RunConfig:
        return self._config.run_config()

    @cached_property
    def _base(self) -> Path:
        return resolve_base(self._run.base.model)

    @cached_property
    def _base_digest(self) -> str:
        return model_digest(self._base)

    def _vector_of(self, cell: Cell) -> TaskVector | None:
        """None is the base. The newest one is kept: the next cell mostly wants it for another domain."""
        key = (cell.members, "" if cell.method is None else cell.method.model_dump_json())
        if self._newest[0] != key:
            self._newest = (key, self._make(cell))
        return self._newest[1]

    def _make(self, cell: Cell) -> TaskVector | None:
        taus = {member.domain: self._fine_tuned(member) for member in cell.members}
        if cell.method is None:
            return next(iter(taus.values()), None)
        catalogs = {name: self.domain(name).catalog() for name in taus}
        work = self._folder / "merges" / "+".join(_name(member) for member in cell.members)
        cache = self._folder / "embeddings"
        result = run_merge(cell.method, self._base, taus, catalogs, self._run, work, self._report, cache)
        self.merged.setdefault(cell.row, []).append(replace(result, vector={}))
        return result.vector

    def _fine_tuned(self, member: Member) -> TaskVector:
        domain = part_of(self.domain(member.domain), member.share, self._run.run.seed)
        fitted = fine_tune(domain, self._base, self._run, self._folder / "fits", self._report)
        return read_vector(fitted.vector_path, trainable_tensors(self._base), self._run.training.vector_codec)

    def _evaluate(self, tau: TaskVector | None, domain: Domain) -> Ranks:
        with TemporaryDirectory(prefix=".evaluated-", dir=self._folder) as temporary:
            folder = self._base
            if tau is not None:
                folder, whole = Path(temporary) / "model", apply(load_tensors(self._base), tau)
                pooling = self._run.base.pooling
                save_model(self._base, {n: whole[n] for n in tau}, folder, readme=_README, pooling=pooling)
            encoder = load_encoder(folder, self._run, training=False)
        return evaluate(encoder, domain, self._run, self._split, self._report).rank_U


def part_of(domain: Domain, share: float, seed: int) -> Domain:
    """The domain with a seeded `share` of its users (at least two) and its whole catalog."""
    users = len(domain.user_ids)
    kept = min(users, max(2, round(share * users)))
    if kept == users:
        return domain
    rows = np.sort(np.random.default_rng([seed, kept]).choice(users, size=kept, replace=False))
    return domain.with_users(rows)


def _name(member: Member) -> str:
    return member.domain if member.share == 1 else f"{member.domain}@{member.share:g}"
