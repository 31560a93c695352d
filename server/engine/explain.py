"""`isthmus merge --explain METHOD`: what a method does, its paper, equation, options, needs and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from server.merging import Method, methods, unknown_name


@dataclass(frozen=True)
class Explanation:
    """One method, for a reader or (`asdict`) for a machine. `merges`: "models" or "adapters"."""

    name: str
    merges: str
    summary: str
    paper: str
    equation: str
    options: dict[str, Any]  # with defaults
    needs: str
    memory: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [self.name, *(f"  {line}".rstrip() for line in self.summary.splitlines()), ""]
        options = ", ".join(f"{key} = {value!r}" for key, value in self.options.items()) or "none"
        facts = {
            "merges": self.merges,
            "paper": self.paper,
            "equation": self.equation,
            "options": options,
            "needs": self.needs,
            "memory": self.memory,
        }
        return "\n".join(lines + [f"  {key + ':':<10}{value}" for key, value in facts.items()])


def explain(name: str) -> list[Explanation]:
    """The method called `name`, or every method for "all". Raises ConfigError with the nearest name."""
    found = {e.name: e for e in _all()}
    if name == "all":
        return list(found.values())
    if name not in found:
        raise unknown_name("merge method", name, found)
    return [found[name]]


def _all() -> list[Explanation]:
    free = [_training_free(method) for _, method in sorted(methods().items())]
    return [*free, *_learned(), *_adapters()]


def _training_free(method: Method) -> Explanation:
    return Explanation(
        method.name,
        "models",
        method.summary,
        method.paper,
        method.equation,
        method.resolve({}),
        "the catalog of every model" if method.needs == "grams" else "nothing else",
        _memory(method),
    )


def _memory(method: Method) -> str:
    if method.needs:
        return "all vectors"
    return "one tensor of every model" if method.unit == "tensor" else "a few MB, whatever the models' size"


def _learned() -> list[Explanation]:
    from common.config import MergeMethod
    from server.merge import LEARNED_PAPERS, check_method

    equation = "tau = sum_d lambda_{g,d} tau_d, g the groups of tensors that share a coefficient"
    summary = (
        "Coefficients of the vectors, learned on pseudo-users that are made from the catalogs.\n\n"
        "Steps and the rest are in the recipe's [learning] section, as in a run's configuration. Minutes."
    )
    return [
        Explanation(
            name,
            "models",
            summary,
            paper,
            equation,
            check_method(MergeMethod(method=name)),
            "the catalog of every model",
            "all vectors",
        )
        for name, paper in LEARNED_PAPERS.items()
    ]


def _adapters() -> list[Explanation]:
    from server.adapters import adapter_methods

    return [
        Explanation(
            rule.name,
            "adapters",
            rule.summary,
            rule.paper,
            rule.equation,
            {name: field.default for name, field in rule.options.model_fields.items()},
            "adapters of one base",
            "the merged adapter",
        )
        for rule in adapter_methods().values()
    ]
