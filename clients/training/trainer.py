"""`transformers.Trainer` with the parts replaced that the recipe and the crash rule need otherwise.

The loop, AdamW, gradient clipping and skipping of seen batches on resume are the library's. Ours are:
the loss (a `Tower`), the schedule (linear warm-up that starts above zero, so that even one step
changes something, then linear decay), validation by full ranking with early stopping, the wall-clock
budget, and checkpoints without pickle. No model card, no integration, no progress bar: the library
writes nothing, and `metrics.jsonl` holds numbers alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from clients.training.checkpoint import (
    read_state,
    read_weights,
    restore_optimizer,
    restore_random,
    write_checkpoint,
)
from clients.training.dataset import Batch
from common.errors import ModelError
from common.files import write_atomic
from common.progress import Report
from common.vectors import save_tensors

LOG_EVERY_STEPS = 10
TRIM_EVERY_STEPS = 5
CLOCK_EVERY_S = 5.0
BEST_PREFIX = "best-"
Validate = Callable[[], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do, in numbers (fields as in `TrainingSection`); validation maximises `metric`."""

    learning_rate: float
    weight_decay: float
    warmup_steps: int
    max_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
    patience: int
    max_minutes: float | None
    seed: int
    metric: str


@dataclasses.dataclass
class Progress:
    """What must survive a kill beside weights, optimiser and random state."""

    best_step: int = 0
    best_score: float = -math.inf
    worse: int = 0
    elapsed_s: float = 0.0
    evaluation_s: float = 0.0

    def finished(self, step: int, plan: Plan) -> bool:
        """Whether nothing is left to train at `step`."""
        return step >= plan.max_steps or self.worse >= plan.patience


class Tower(Protocol):
    """A backbone with its loss: `forward(**batch)` gives `{"loss": scalar}`."""

    backbone: nn.Module

    def trained_tensors(self) -> dict[str, Tensor]:
        """What trains, by the names under which it is kept (not copied)."""

    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Put `trained_tensors` of an earlier moment back in place."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of any module."""


class EncoderTrainer(Trainer):  # type: ignore[misc]
    """Trains a `Tower` on prepared batches; `folder` holds checkpoints, best weights, metrics, clock."""

    lr_scheduler: Any

    def __init__(
        self,
        tower: Tower,
        batches: torch.utils.data.Dataset[Batch],
        validate: Validate,
        plan: Plan,
        folder: Path,
        report: Report,
    ) -> None:
        on_cpu = next(tower.parameters()).device.type == "cpu"
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=plan.max_steps,
            per_device_train_batch_size=1,  # an element of `batches` is a whole batch already
            learning_rate=plan.learning_rate,
            weight_decay=plan.weight_decay,
            seed=plan.seed % 2**32,
            use_cpu=on_cpu,
            report_to="none",
            disable_tqdm=True,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
        )
        super().__init__(model=tower, args=arguments, train_dataset=batches)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Pace(self))
        self.tower, self.plan, self.folder, self.told = tower, plan, folder, report
        self.progress = Progress()
        self.last_loss = math.nan
        self._validate_tower = validate
        self._clock_started_s = time.monotonic()
        self._clock_written_s = -math.inf

    def restore(self, checkpoint: Path | None) -> int:
        """Take progress from `checkpoint` and the clock file; returns the step reached."""
        step = 0
        if checkpoint is not None:
            state = read_state(checkpoint)
            step = int(state["step"])
            self.progress = Progress(**state["progress"])
            self.tower.load_trained(read_weights(checkpoint))
        clock = self.folder / "clock.json"
        if clock.is_file():
            elapsed_s = float(json.loads(clock.read_text(encoding="utf-8"))["elapsed_s"])
            self.progress.elapsed_s = max(self.progress.elapsed_s, elapsed_s)
        self._cut_log(step)
        return step

    # --- the library's extension points -------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Batches in their own order, in this process."""
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=_only)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear warm-up from 1/n to 1, then linear decay towards 0 at the last step."""
        scheduler: LambdaLR | None = self.lr_scheduler
        if scheduler is None:
            warmup = min(self.plan.warmup_steps, num_training_steps)
            left = max(num_training_steps - warmup, 1)

            def factor(step: int) -> float:
                if step < warmup:
                    return (step + 1) / warmup
                return max(num_training_steps - step, 0) / left

            scheduler = self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return scheduler

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """The library's step; refuses to go on from a loss that is not finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.last_loss = float(loss)
        if not math.isfinite(self.last_loss):
            raise ModelError(
                f"the loss is not finite at step {self.state.global_step + 1}",
                next_step="lower training.learning_rate or raise training.temperature",
            )
        return loss

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Validate, keep the weights if they are the best so far, and stop when patience is over."""
        started_s, step, progress = time.monotonic(), self.state.global_step, self.progress
        metrics = self._validate_tower()
        progress.evaluation_s = time.monotonic() - started_s
        score = metrics[self.plan.metric]
        if score > progress.best_score:
            save_tensors(self.folder / f"{BEST_PREFIX}{step}.safetensors", self.tower.trained_tensors())
            progress.best_step, progress.best_score, progress.worse = step, score, 0
        else:
            progress.worse += 1
        self.log_line({"step": step, **{f"validation_{name}": value for name, value in metrics.items()}})
        self.control.should_evaluate = False
        self.control.should_training_stop |= progress.finished(step, self.plan)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        self.progress.elapsed_s = self.elapsed_s()
        self._clock_started_s = time.monotonic()
        write_checkpoint(
            self.folder,
            step,
            weights=self.tower.trained_tensors(),
            optimizer=self.optimizer,
            trainer_state=dataclasses.asdict(self.state),
            state={
                "step": step,
                "progress": dataclasses.asdict(self.progress),
                "scheduler": self.lr_scheduler.state_dict(),  # numbers alone: a plain function is left out
            },
        )
        kept = self.folder / f"{BEST_PREFIX}{self.progress.best_step}.safetensors"
        for path in self.folder.glob(f"{BEST_PREFIX}*.safetensors"):
            if path != kept:
                path.unlink()
        self.control.should_save = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.tower.load_trained(read_weights(Path(resume_from_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        restore_optimizer(Path(checkpoint), self.optimizer)
        self.lr_scheduler.load_state_dict(read_state(Path(checkpoint))["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random(Path(checkpoint))

    def close(self) -> None:
        """After the last step."""

    # --- clock and log ------------------------------------------------------------------------------

    def elapsed_s(self) -> float:
        """Seconds spent on this fine-tuning, earlier attempts included."""
        return self.progress.elapsed_s + time.monotonic() - self._clock_started_s

    def out_of_time(self) -> bool:
        """Whether the budget leaves no more than one validation."""
        budget = self.plan.max_minutes
        return budget is not None and self.elapsed_s() + self.progress.evaluation_s >= 60 * budget

    def tick(self) -> None:
        """Persist the clock now and then, so that kills do not stretch the budget."""
        now_s = time.monotonic()
        if now_s - self._clock_written_s >= CLOCK_EVERY_S:
            self._clock_written_s = now_s
            write_atomic(
                self.folder / "clock.json", json.dumps({"elapsed_s": round(self.elapsed_s(), 3)}).encode()
            )

    def log_line(self, record: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _cut_log(self, step: int) -> None:
        """Drop lines of steps that will be taken again."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_atomic(path, "".join(f"{line}\n" for line in kept).encode())


class _Pace(TrainerCallback):  # type: ignore[misc]
    """Decides after each step whether to validate, to save, to stop; and tells how far we are."""

    def __init__(self, trainer: EncoderTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        trainer, plan, step = self._trainer, self._trainer.plan, state.global_step
        trainer.tick()
        trainer.told(phase="train", step=step, total=plan.max_steps, loss=trainer.last_loss)
        if step % TRIM_EVERY_STEPS == 0:
            return_free_memory()
        if step % LOG_EVERY_STEPS == 0 or step == 1:
            rate = trainer.optimizer.param_groups[0]["lr"]
            trainer.log_line({"step": step, "loss": trainer.last_loss, "next_learning_rate": rate})
        ending = step >= plan.max_steps or trainer.out_of_time()
        control.should_evaluate = ending or step % plan.eval_every_steps == 0
        control.should_save = step % plan.checkpoint_every_steps == 0
        control.should_training_stop |= ending


def return_free_memory() -> None:
    """Give malloc's free pages back (glibc): batches of changing shape fragment the heap by gigabytes."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _only(batches: list[Batch]) -> Batch:
    return batches[0]
