"""The sum of users' clipped gradients, with no user's gradient in memory: ghost clipping.

For one user, a linear layer's gradient is `B^T A`, where `A` (inputs) and `B` (the loss's gradient of the
outputs) have a row for each token of that user's texts. The square of its norm is the sum of all entries of
`(A A^T) * (B B^T)` (Goodfellow, "Efficient per-example gradient computations", 2015); where tokens are so
many that the gradient itself is cheaper, it is made, measured and dropped, layer by layer. The norms give
each user's factor, and one product a layer the sum: inputs and gradients of outputs are kept for it (Bu et
al., "Differentially private optimization on large foundation models at low cost", ICML 2023).

The users of a step have the same negatives, and nothing is random: so the model embeds them once for all.
What flows back through them is each user's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clients.training.dataset import Batch
from clients.training.loss import TwoTower
from common.errors import ModelError

USERS_AT_ONCE = 16
Gradients = dict[nn.Parameter, Tensor]
Tokens = tuple[Tensor, Tensor]  # a layer's A and B: (..., tokens, inputs) and (..., tokens, outputs)


class GhostClipping:
    """Watches the layers of a tower that train, while `summed` runs; `close` takes the hooks off.

    Raises ModelError where a tensor is trained that is no linear or normalisation layer's own, or where a
    layer does not take (rows, tokens, width).
    """

    def __init__(self, tower: TwoTower) -> None:
        self._tower = tower
        self._layers = _trained_layers(tower.backbone)
        self._pass: Pass | None = None
        words = tower.backbone.get_input_embeddings()  # type: ignore[operator]
        self._hooks = [words.register_forward_hook(self._begin)]
        self._hooks += [layer.register_forward_hook(self._watch) for layer in self._layers]
        self._check_rows()

    def summed(self, batch: Batch, clip: float) -> tuple[Gradients, Tensor]:
        """The sum of the users' gradients, each cut to L2 norm `clip`, and their losses (U).

        `batch` is one of `private.PrivateBatches`. Raises ModelError where a gradient is not finite.
        """
        summed = {
            parameter: torch.zeros_like(parameter)
            for layer in self._layers
            for parameter in layer.parameters(recurse=False)
        }
        blocked_UI = batch["blocked_UI"]
        if not len(blocked_UI):
            return summed, torch.zeros(0)
        shared = Shared(self._embed(batch["negative_ids_IT"], batch["negative_mask_IT"]))
        losses = []
        for start in range(0, len(blocked_UI), USERS_AT_ONCE):
            rows = {name: batch[name][start : start + USERS_AT_ONCE] for name in batch if "_U" in name}
            history = self._embed(rows["history_ids_UT"], rows["history_mask_UT"])
            target = self._embed(rows["target_ids_UT"], rows["target_mask_UT"])
            loss_U, grad_UE, grad_target_UE, grad_UIE = self._loss_gradients(
                history.z_NE, target.z_NE, shared.embedded.z_NE, rows["blocked_UI"]
            )
            losses.append(loss_U)
            history.backward(grad_UE)
            target.backward(grad_target_UE)
            own = {
                layer: _side_by_side(history.tokens(layer), target.tokens(layer)) for layer in history.calls
            }
            factor_U = _factors(shared.norms(own, grad_UIE), clip)
            for layer, (a_UTC, b_UTR) in own.items():
                _add(summed, layer, a_UTC.flatten(0, 1), (b_UTR * factor_U[:, None, None]).flatten(0, 1))
            shared.weigh(factor_U)
        for layer, (a_TC, b_TR) in shared.weighed():
            _add(summed, layer, a_TC, b_TR)
        return summed, torch.cat(losses)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _embed(self, ids_NT: Tensor, mask_NT: Tensor) -> Pass:
        seen = self._pass = Pass()
        try:
            with torch.enable_grad():
                seen.z_NE = self._tower.embed(ids_NT, mask_NT)
        finally:
            self._pass = None
        return seen

    def _loss_gradients(
        self, z_UE: Tensor, target_UE: Tensor, negative_IE: Tensor, blocked_UI: Tensor
    ) -> tuple[Tensor, ...]:
        """Each user's loss (U), and its gradient of the user's embedding, the target's and the negatives'."""
        with torch.enable_grad():
            z_UE, target_UE = z_UE.detach().requires_grad_(), target_UE.detach().requires_grad_()
            negative_UIE = negative_IE.detach().repeat(len(z_UE), 1, 1).requires_grad_()
            loss_U = self._tower.own_losses(z_UE, target_UE, negative_UIE, blocked_UI)
            return loss_U.detach(), *torch.autograd.grad(loss_U.sum(), [z_UE, target_UE, negative_UIE])

    def _begin(self, _words: nn.Module, _inputs: object, output: Tensor) -> None:
        """What flows back ends at the word embeddings, which are frozen."""
        if self._pass is not None:
            self._pass.start = output.requires_grad_()

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._pass is not None:
            self._pass.calls.setdefault(layer, []).append(Call(inputs[0].detach(), output))

    def _check_rows(self) -> None:
        rows, tokens = 2, 3
        ids_NT = torch.zeros(rows, tokens, dtype=torch.int64, device=next(self._tower.parameters()).device)
        names = {layer: name for name, layer in self._tower.backbone.named_modules()}
        for layer, calls in self._embed(ids_NT, torch.ones_like(ids_NT)).calls.items():
            for call in calls:
                if call.input.shape[:-1] != (rows, tokens):
                    raise ModelError(
                        f"layer {names[layer]!r} takes {tuple(call.input.shape)} for {rows} texts of "
                        f"{tokens} tokens: dp-sgd cannot tell users apart in it",
                        next_step="use a model of the BERT or RoBERTa kind, or no differential privacy",
                    )


class Call:
    """One call of a layer: its `input` and, once something flowed back, the `grad` of its output.

    Both are (rows, tokens, width).
    """

    def __init__(self, input_: Tensor, output: Tensor) -> None:
        self.input = input_
        self.grad = output.detach().new_zeros(()).expand(output.shape)
        output.register_hook(self._keep)  # type: ignore[no-untyped-call]

    def _keep(self, grad: Tensor) -> None:
        self.grad = grad


class Pass:
    """The embeddings `z_NE` of one forward pass, and the calls of each layer in it."""

    z_NE: Tensor
    start: Tensor

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[Call]] = {}

    def backward(self, grad_NE: Tensor, *, again: bool = False) -> None:
        """Bring a gradient of the embeddings to every call; `again`: not the last time.

        It goes as far as the word embeddings, and to no parameter.
        """
        torch.autograd.grad(self.z_NE, self.start, grad_NE, retain_graph=again)

    def tokens(self, layer: nn.Module) -> Tokens:
        """What the layer saw in all its calls: (rows, tokens, width), in float32."""
        calls = self.calls[layer]
        return _joined([call.input for call in calls]), _joined([call.grad for call in calls])


class Shared:
    """The negatives of a step, embedded once, and what flows back through them for each user."""

    def __init__(self, embedded: Pass) -> None:
        self.embedded = embedded
        self._a = {layer: embedded.tokens(layer)[0].flatten(0, 1) for layer in embedded.calls}
        self._gram = {layer: a_TC @ a_TC.T for layer, a_TC in self._a.items() if isinstance(layer, nn.Linear)}
        self._b: list[dict[nn.Module, Tensor]] = []
        self._weighed: dict[nn.Module, Tensor] = {}

    def norms(self, own: dict[nn.Module, Tokens], grad_UIE: Tensor) -> Tensor:
        """The norm of each user's gradient (U) over all layers, by its `own` tokens and these negatives."""
        self._b, squares = [], []
        for user, grad_IE in enumerate(grad_UIE):
            self.embedded.backward(grad_IE, again=True)
            self._b.append({layer: self.embedded.tokens(layer)[1].flatten(0, 1) for layer in self._a})
            squares.append(
                torch.stack(
                    [
                        self._square(layer, (a_UTC[user], b_UTR[user]), self._b[-1][layer])
                        for layer, (a_UTC, b_UTR) in own.items()
                    ]
                ).sum()
            )
        return torch.stack(squares).clamp(min=0).sqrt()

    def weigh(self, factor_U: Tensor) -> None:
        """Add to the weighted sum what flowed back for the users of the last `norms`."""
        for factor, flowed in zip(factor_U.tolist(), self._b, strict=True):
            for layer, b_TR in flowed.items():
                if layer in self._weighed:
                    self._weighed[layer].add_(b_TR, alpha=factor)
                else:
                    self._weighed[layer] = factor * b_TR

    def weighed(self) -> list[tuple[nn.Module, Tokens]]:
        """The negatives' part of the sum over users, by layer."""
        return [(layer, (self._a[layer], b_TR)) for layer, b_TR in self._weighed.items()]

    def _square(self, layer: nn.Module, own: Tokens, b_TR: Tensor) -> Tensor:
        """The square of the norm of one user's gradient of one layer; `b_TR` is of the negatives."""
        (own_TC, own_TR), a_TC = own, self._a[layer]
        if not isinstance(layer, nn.Linear) or not _gram_is_cheaper(own_TC, a_TC, b_TR):
            gradients = _gradients(layer, torch.cat([own_TC, a_TC]), torch.cat([own_TR, b_TR]))
            return torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        square = ((own_TC @ own_TC.T) * (own_TR @ own_TR.T)).sum()
        square = square + 2 * ((own_TC @ a_TC.T) * (own_TR @ b_TR.T)).sum()
        square = square + (self._gram[layer] * (b_TR @ b_TR.T)).sum()
        return square if layer.bias is None else square + (own_TR.sum(0) + b_TR.sum(0)).square().sum()


def _trained_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose parameters train. Raises ModelError for any other trained tensor."""
    layers: list[nn.Module] = []
    owner: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained:
            continue
        if type(module) not in (nn.Linear, nn.LayerNorm) or len(trained) < len(parameters):
            what = f"{name!r} is no linear or normalisation layer that trains as a whole"
        elif twice := [owner[parameter] for parameter in trained if parameter in owner]:
            what = f"{name!r} and {twice[0]!r} share a tensor"
        else:
            layers.append(module)
            owner |= dict.fromkeys(trained, name)
            continue
        raise ModelError(f"{what}: dp-sgd cannot bound it", next_step="use another base model")
    return layers


def _side_by_side(left: Tokens, right: Tokens) -> Tokens:
    return _joined([left[0], right[0]]), _joined([left[1], right[1]])


def _joined(parts: list[Tensor]) -> Tensor:
    """The tokens of all parts (rows, tokens, width), in float32."""
    return parts[0].float() if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=1)


def _gram_is_cheaper(own_TC: Tensor, a_TC: Tensor, b_TR: Tensor) -> bool:
    """Whether products over tokens take less than `B^T A`; those of the negatives' inputs are made once."""
    own, shared, inputs, outputs = len(own_TC), len(a_TC), a_TC.shape[1], b_TR.shape[1]
    products = own * (own + shared) * (inputs + outputs) + shared**2 * outputs
    return products < (own + shared) * inputs * outputs


def _factors(norm_U: Tensor, clip: float) -> Tensor:
    if not bool(norm_U.isfinite().all()):
        raise ModelError(
            "a user's gradient is not finite",
            next_step="lower training.learning_rate or raise training.temperature",
        )
    return (clip / (norm_U + 1e-6)).clamp(max=1.0)


def _gradients(layer: nn.Module, a_TC: Tensor, b_TR: Tensor) -> list[Tensor]:
    """The gradients of the layer's weight and, where it has one, bias over these tokens."""
    if isinstance(layer, nn.LayerNorm):
        normal_TC = nn.functional.layer_norm(a_TC, layer.normalized_shape, eps=layer.eps)
        weight = (normal_TC * b_TR).sum(0)
    else:
        weight = b_TR.T @ a_TC
    return [weight] if layer.bias is None else [weight, b_TR.sum(0)]


def _add(summed: Gradients, layer: nn.Module, a_TC: Tensor, b_TR: Tensor) -> None:
    for parameter, gradient in zip(
        layer.parameters(recurse=False), _gradients(layer, a_TC, b_TR), strict=True
    ):
        summed[parameter] += gradient
