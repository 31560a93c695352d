"""`isthmus merge --explain METHOD`: what a method does, its paper, equation, options, needs and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from server.merging import Method, methods, unknown_name

_BLOCKS = {
    "block": "a block (256 KB)",
    "rows": "some rows (256 KB, or one row)",
    "matrix": "the largest linear layer's matrix",
    "tensor": "the largest tensor",
}
_LEARNED = """\
Coefficients of the vectors, learned on pseudo-users that are made from the catalogs.

Steps and the rest are in the recipe's [learning] section, as in a run's configuration. Each step is a forward
and a backward pass of the merged model."""
_LEARNED_EQUATION = (
    "tau = sum_d lambda_{g,d} tau_d, g the groups of tensors that share a coefficient; lambda minimises "
)
_CONFLUENCE = """\
Weighs the vectors and scales a merge by `rule` so that no domain's model is left behind, then distils.

The weights are those whose merge agrees best with the domains' models on held-back pseudo-users. Then `steps`
steps move all merged tensors towards the average of each domain's model and the merge. `steps = 0` leaves
that out, `rounds = 0` the weighing. No labels and no users are needed. Costs `rounds + 6` rankings of the
held-back pseudo-users, two passes of a model over each catalog, and `steps` forward and backward passes."""
_CONFLUENCE_EQUATION = (
    "theta_0 + scale rule(w_d tau_d), then argmin_theta KL(softmax(t / T) || softmax(s / T))"
)
_CHOSEN = """\
Merges by every candidate and keeps the one that ranks most as the fine-tuned models do.

They rank items for pseudo-users whose items no candidate was learned on. A candidate that falls short by more
than `margin` in any domain is out; of the others the best average wins. Costs what its candidates cost, and
one ranking of each."""
_CHOSEN_EQUATION = "argmax_c mean_d NDCG@10(c, d) over c with max_c' NDCG@10(c', d) - NDCG@10(c, d) <= margin"


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
    return f"{_BLOCKS[method.unit]} of every model"


def _learned() -> list[Explanation]:
    from common.config import MergeMethod
    from server.learning.confluence import CONFLUENCE
    from server.learning.losses import LOSSES
    from server.learning.options import AUTO
    from server.merge import LEARNED_PAPERS, check_method

    own = {AUTO: (_CHOSEN, _CHOSEN_EQUATION), CONFLUENCE: (_CONFLUENCE, _CONFLUENCE_EQUATION)}
    return [
        Explanation(
            name,
            "models",
            own[name][0] if name in own else _LEARNED,
            paper,
            own[name][1] if name in own else _LEARNED_EQUATION + LOSSES[name].equation,
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
