"""Configuration: frozen models read from one TOML file, with unknown keys refused.

Rules: nothing is global, nothing is evaluated, every value has a unit in its name, an unknown key is
refused with the nearest known one, and the resolved configuration is saved beside the result.
`RunConfig` is what `isthmus run start` reads and what the server sends to the owners;
`simulations.config` adds the domains for the one-machine simulation.

    >>> RunConfig.model_validate({"run": {"name": "demo"}}).training.batch_size
    64
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.errors import ConfigError, suggest

EMBEDDED_BASE = "embedded"
DEFAULT_PUBLISHED = ("confluence", "task-arithmetic")  # the first that is among the merges
Objective = Literal["answer", "choice"]
ADAPTER_MERGES = ("factors", "knots", "product")
INSTRUCTION_EVALUATION = {"k": 3, "batch_size": 8}
INSTRUCTION_CUTS = (1, 3)  # NDCG@k by which early stopping and comparisons go

REFERENCE_LEARNING: dict[str, Any] = {
    "steps": 500,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "temperature": 0.05,
    "distillation_weight": 1000.0,
    "item_embeddings": "stale",
    "mask_seen": False,
    "history_length": 1,
    "target": "own",
    "initial_search": False,
    "holdout": 0.0,
    "vectors": "fp32",
}


class Frozen(BaseModel):
    """Immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSection(Frozen):
    """What the run is called and when it may go on without everybody."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    seed: int = Field(0, ge=0)
    quorum: int = Field(0, ge=0, description="domains that must deliver; 0 means all that were invited")
    deadline_minutes: float = Field(
        24 * 60, gt=0, description="how long each round waits for every domain; then the quorum is enough"
    )
    max_norm: float | None = Field(
        None, gt=0, description="L2 norm that a task vector may have; None: that of the base's own tensors"
    )


class BaseSection(Frozen):
    """The shared base model: `embedded` (all-MiniLM-L6-v2) or a folder in Hugging Face layout."""

    model: str = EMBEDDED_BASE
    pooling: Literal["auto", "mean", "cls"] = "auto"


class TextSection(Frozen):
    """How items and histories become text (MergeRec sec. 2, with the reference's defaults)."""

    attributes: tuple[str, ...] = ("title", "brand", "category")
    max_attribute_tokens: int = Field(32, ge=1)
    max_seq_len: int = Field(64, ge=8, description="tokens of a user's history, special tokens included")
    max_history_items: int = Field(50, ge=1)


class TrainingSection(Frozen):
    """Fine-tuning inside a domain."""

    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(5e-5, gt=0)
    temperature: float = Field(0.05, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(100, ge=0)
    max_steps: int = Field(300, ge=1)
    eval_every_steps: int = Field(100, ge=1)
    patience: int = Field(5, ge=1, description="evaluations without a better validation NDCG@10")
    checkpoint_every_steps: int = Field(50, ge=1)
    max_minutes: float | None = Field(
        None, gt=0, description="wall-clock budget; still ends with a valid vector"
    )
    positions_per_user: Literal["all", "last"] = "all"
    history_negatives: int = Field(
        0, ge=0, description="newest items of each history that are negatives; 0: no item of the history is"
    )
    logq_correction: bool = Field(
        False, description="take out of the loss that popular items are in-batch negatives more often"
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="None keeps the base model's own")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    validation_users: int = Field(1000, ge=1, description="at most so many for early stopping")
    vector_codec: Literal["fp32", "bf16"] = "bf16"


class PrivacySection(Frozen):
    """Differential privacy of each user in fine-tuning: an option, off unless `mechanism` names one.

    Give either `epsilon` (the noise is then found by accounting) or `noise_multiplier`.
    """

    mechanism: Literal["none", "dp-sgd"] = "none"
    epsilon: float | None = Field(None, gt=0, le=1000, description="what one fine-tuning may spend")
    noise_multiplier: float | None = Field(
        None, ge=0.1, le=1000, description="standard deviation of the noise, in units of `clip_norm`"
    )
    delta: float = Field(1e-5, ge=1e-12, lt=1, description="refused unless it is below 1 / users")
    clip_norm: float = Field(1.0, ge=1e-3, le=1000, description="L2 bound of what one user adds to one step")
    negatives: int = Field(16, ge=1, description="catalog items of a step, the same for all users in it")

    @model_validator(mode="after")
    def _check_amount(self) -> PrivacySection:
        given = [name for name in ("epsilon", "noise_multiplier") if getattr(self, name) is not None]
        if self.mechanism == "none" and given:
            raise ValueError(f"{given[0]} does nothing without mechanism = 'dp-sgd'")
        if self.mechanism != "none" and len(given) != 1:
            raise ValueError("give either epsilon or noise_multiplier")
        return self


class LearningSection(Frozen):
    """Learned merging coefficients on pseudo-users; each way in which the literature differs is a key.

    `preset = "reference"` fills every key that is not given with the authors' value; a dump of the
    section holds the resolved values, so it reads back as the same section.
    """

    preset: Literal["default", "reference"] = "default"
    steps: int = Field(500, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    initial: float | None = Field(None, description="None: 0.2 on plain vectors, 1.0 on processed ones")
    initial_search: bool = Field(
        False, description="begin at the common coefficient of the lowest held-back loss"
    )
    temperature: float = Field(0.05, gt=0)
    distillation_weight: float = Field(1000.0, ge=0, description="alpha of MergeRec")
    target: Literal["own", "ensemble"] = "own"
    candidates: int = Field(
        50, ge=1, description="the teacher's best items that ranking-distillation compares"
    )
    random_negatives: int = Field(50, ge=0, description="further items that ranking-distillation compares")
    item_embeddings: Literal["stale", "refreshed"] = "refreshed"
    refresh_every_steps: int = Field(100, ge=1)
    mask_seen: bool = True
    history_length: int = Field(1, ge=1, description="1: one-item histories; n: rolled out to 1..n items")
    rollout_top_k: int = Field(20, ge=1, description="a rolled-out item is drawn from the teacher's best k")
    rollout_temperature: float = Field(0.05, gt=0)
    holdout: float = Field(0.1, ge=0, le=0.5, description="share of each catalog that is never learned from")
    holdout_users: int = Field(64, ge=1, description="held-back pseudo-users of a domain, at most")
    holdout_items: int = Field(500, ge=2, description="items of a domain that they rank, at most")
    evaluate_every_steps: int = Field(100, ge=1)
    patience: int = Field(2, ge=1, description="evaluations without a lower held-back loss before it stops")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    vectors: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") == "reference":
            return {**REFERENCE_LEARNING, **data}
        return data

    @model_validator(mode="after")
    def _check_search(self) -> LearningSection:
        if self.initial_search and not self.holdout:
            raise ValueError("initial_search needs held-back pseudo-users; set holdout above 0")
        return self


class LoraSection(Frozen):
    """Fine-tuning by low-rank adapters (LoRA): what crosses is then the adapter, its A and its B.

    An adapted layer computes `W x + alpha / rank * B A x` with `A` [rank, inputs] and `B` [outputs, rank].
    """

    rank: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1, description="on the input of A while training")
    modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="names of the linear layers that get an adapter; each occurs in every block",
    )
    gradient_checkpointing: bool = Field(
        True, description="compute activations twice and keep few: slower, with less memory"
    )
    publish_merged: bool = Field(
        False, description="publish the base with the adapter merged into it, too, in the folder `merged`"
    )

    @field_validator("modules")
    @classmethod
    def _check_modules(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        for name in modules:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"{name!r} is not the name of a layer, such as q_proj")
        return modules

    @property
    def scaling(self) -> float:
        """What `B A x` is multiplied by."""
        return self.alpha / self.rank


class InstructionSection(Frozen):
    """Instruction ranking with a causal language model: a prompt holds history and candidates (RecCocktail).

    One candidate of each prompt is the user's next item; the others are drawn from items that the user
    never had. The answer names the titles, best first.
    """

    template: str = Field(
        "ranking",
        pattern=r"^[a-z0-9][a-z0-9-]{0,39}$",  # never a path: a run may not say what an owner reads
        description="a prompt template that comes with Isthmus",
    )
    candidates: int = Field(30, ge=2, le=1000)
    protocol: Literal["warm", "cold"] = Field(
        "warm", description="`cold`: test only on items that no training or validation sequence holds"
    )
    history_items: int = Field(10, ge=1, description="newest items of a history that a prompt shows")
    title_words: int = Field(
        20,
        ge=0,
        description="titles are cut to so many words, or few candidates of a prompt would fill it; 0: whole",
    )
    max_prompt_tokens: int = Field(1024, ge=16, description="longer prompts lose the oldest items")
    prompts_at_once: int = Field(
        8, ge=1, description="of a training step in memory; their gradients are added up to that of the step"
    )
    objective: Objective = Field(
        "answer",
        description="what merges of adapters are compared by on labelled prompts: `answer`, the loss a token "
        "of it; `choice`, the loss of choosing it among the candidates",
    )
    generated_users: int = Field(
        0, ge=0, description="test users whose answers are also generated, for the rate of valid answers"
    )


SERVER_FILES = ("samples",)  # merge options that name a file of the server's


class MergeMethod(Frozen):
    """One `[[merge]]` entry: a method, its options, and the name under which it is reported."""

    method: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    name: str = Field("", pattern=r"^([a-z0-9][a-z0-9._-]{0,39})?$")
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)
    learning: LearningSection | None = None

    @property
    def label(self) -> str:
        """The name in tables: `name` if given, else method plus granularity."""
        if self.name:
            return self.name
        granularity = self.options.get("granularity")
        return f"{self.method}-{granularity}" if granularity else self.method


class EvaluationSection(Frozen):
    """Leave-one-out, full ranking over the domain's catalog."""

    k: int = Field(10, ge=1)
    mask_seen: bool = Field(False, description="leave the history's own items out of the ranking")
    max_users: int | None = Field(None, ge=1)
    batch_size: int = Field(128, ge=1)


class RunConfig(Frozen):
    """Everything that a run needs to say, read from one TOML file."""

    run: RunSection = RunSection()
    base: BaseSection = BaseSection()
    text: TextSection = TextSection()
    training: TrainingSection = TrainingSection()
    privacy: PrivacySection = PrivacySection()
    learning: LearningSection = LearningSection()
    merge: tuple[MergeMethod, ...] = (
        MergeMethod(method="weight-averaging"),
        MergeMethod(method="task-arithmetic"),
        MergeMethod(method="ties"),
        MergeMethod(method="iso-c"),
        MergeMethod(method="confluence"),
        MergeMethod(method="adamerging", options={"granularity": "domain"}),
        MergeMethod(method="adamerging", options={"granularity": "layer"}),
        MergeMethod(method="mergerec", options={"granularity": "domain"}),
        MergeMethod(method="mergerec", options={"granularity": "layer"}),
    )
    publish: str = Field(
        "",
        description="label of the merge that becomes the universal model; "
        "empty: confluence or task-arithmetic, if one is among them, else the last",
    )
    evaluation: EvaluationSection = EvaluationSection()
    lora: LoraSection | None = None
    instruction: InstructionSection | None = None

    def for_owners(self) -> RunConfig:
        """What crosses: the base by its folder's name, and no path of the server's.

        An owner's own copy of the base is known by its digest, a file by the digest among the options.
        """
        merge = tuple(
            method.model_copy(
                update={"options": {k: v for k, v in method.options.items() if k not in SERVER_FILES}}
            )
            for method in self.merge
        )
        base = self.base.model_copy(update={"model": Path(self.base.model).name})
        return self.model_copy(update={"base": base, "merge": merge})

    @model_validator(mode="before")
    @classmethod
    def _fill_for_adapters(cls, data: Any) -> Any:
        """What else is the default with `[lora]` and with `[instruction]`."""
        if isinstance(data, dict) and data.get("lora") is not None and "merge" not in data:
            data = {**data, "merge": [{"method": method} for method in ADAPTER_MERGES]}
        if isinstance(data, dict) and data.get("instruction") is not None:
            given = data.get("evaluation", {})
            if isinstance(given, dict):
                data = {**data, "evaluation": {**INSTRUCTION_EVALUATION, **given}}
        return data

    @model_validator(mode="after")
    def _check_adapters(self) -> RunConfig:
        if self.instruction is not None and self.lora is None:
            raise ValueError("a language model trains with adapters only: add a [lora] section")
        if self.lora is not None and self.privacy.mechanism != "none":
            raise ValueError("privacy.mechanism 'dp-sgd' does not go with [lora]")
        if self.instruction is not None and self.evaluation.k not in INSTRUCTION_CUTS:
            raise ValueError(f"with [instruction] evaluation.k is one of {INSTRUCTION_CUTS}")
        return self

    @model_validator(mode="after")
    def _check_privacy(self) -> RunConfig:
        if self.privacy.mechanism != "none":
            for name in ("history_negatives", "logq_correction", "dropout"):
                if getattr(self.training, name):
                    raise ValueError(f"training.{name} does not go with privacy.mechanism 'dp-sgd'")
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> RunConfig:
        labels = [method.label for method in self.merge]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two [[merge]] entries are called {twice[0]!r}; give one a `name`")
        if not labels:
            raise ValueError("no [[merge]] entry; name at least one method")
        if not self.publish:
            chosen = next((label for label in DEFAULT_PUBLISHED if label in labels), labels[-1])
            object.__setattr__(self, "publish", chosen)  # resolved before anybody sees the frozen model
        if self.publish not in labels:
            raise ValueError(f"publish = {self.publish!r} names no [[merge]] entry; there are {labels}")
        return self


ModelT = TypeVar("ModelT", bound=Frozen)


def load_toml(path: Path, model: type[ModelT]) -> ModelT:
    """Read `path` as `model`. Raises ConfigError naming the file, the key and the nearest known key."""
    try:
        data = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file", next_step="check the path") from None
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{path}: not valid TOML: {err}", next_step="mend that line") from None
    return validate(data, model, where=str(path))


def validate(data: dict[str, Any], model: type[ModelT], *, where: str) -> ModelT:
    """Validate `data` as `model`; every refusal becomes a ConfigError that says where."""
    try:
        return model.model_validate(data)
    except ValidationError as err:
        raise _explain(err, model, where) from None


def _explain(err: ValidationError, model: type[BaseModel], where: str) -> ConfigError:
    problems = err.errors()  # a misspelt key is also a missing one: the spelling is what helps
    first = next((found for found in problems if found["type"] == "extra_forbidden"), problems[0])
    path = ".".join(str(part) for part in first["loc"]) or "(top level)"
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        wrong = str(first["loc"][-1])
        hint = suggest(wrong, known, otherwise="known keys here: {}")
        return ConfigError(f"{where}: unknown key {path!r}", next_step=hint)
    return ConfigError(f"{where}: {path}: {first['msg']}", next_step="mend the value")


def _known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The field names of the sub-model at `loc` (list indices are skipped)."""
    current: type[BaseModel] = model
    for part in loc:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        found = _model_in(field.annotation) if field else None
        if found is None:
            return []
        current = found
    return list(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
