"""Long-tail methods that change the classifiers of a network, at every exit.

The bias of a trained classifier towards frequent classes can be corrected while the backbone stays
fixed: by cRT, tau-normalisation and LWS (Kang et al., arXiv 1910.09217, section 4) and by logit
adjustment (Menon et al., arXiv 2007.07314, eq. 9). LDAM trains a normalised classifier instead.

    cRT: reset_classifiers_(model), then train with `train_classifiers(model)` in place of
        `model.train()` and class-balanced batches (`samplers.ClassSampler`).
    LWS: learn_scales_(model), train in the same way, fold_scales_(model).

The functions take an ELF, a module that holds some, or a network without exits, and change its
classifiers in place, once where exits share one. An `ExitHead` whose classifier is a plain
`nn.Linear` afterwards still runs fused.

Shapes: N samples, C classes, D features, E exits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from . import checks
from .base import ELFBase
from .last_layers import LastLayers, find
from .losses import log_prior
from .modes import mode

__all__ = [
    "CosineClassifier",
    "LogitAdjustment",
    "adjust_logits_",
    "classifiers",
    "fold_scales_",
    "learn_scales_",
    "reset_classifiers_",
    "tau_normalise_",
    "tau_normalised",
    "train_classifiers",
    "use_cosine_",
]


class CosineClassifier(nn.Module):
    """Cosines between features and class weights: the normalised classifier of LDAM (Cao et al.,
    arXiv 1906.07413). An exit takes it as `head.classifier`; see `use_cosine_`.

    The exit test applies neither the scale nor the margins of the loss. Give the ELF
    temperatures = 1 / scale, or no confidence gets far above 1 / C, and
    train_thresholds = loss.margin_thresholds(...).

    Shape: features [N, D] -> logits [N, C] in [-1, 1].
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        checks.integer("in_features", in_features, 1)
        checks.integer("num_classes", num_classes, 1)
        self.in_features = in_features
        self.out_features = num_classes
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))  # [C, D]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.out_features}"


def classifiers(model: nn.Module) -> dict[str, nn.Linear | CosineClassifier]:
    """The classifiers of every exit, by name in the model: the `nn.Linear` or `CosineClassifier`
    that runs last in the head, or in the stage where the head is `nn.Identity`; without exits, in
    the network. A distilled network (DeiT, LeViT) has two, and its logits are their mean.

    Raises:
        ValueError: a head or the network has none, or its logits are not those of one classifier or
            the mean of several.
    """
    found: dict[str, nn.Linear | CosineClassifier] = {}
    for last in _by_exit(model).values():
        found.update(last.layers)
    return found


def _by_exit(model: nn.Module) -> dict[str, LastLayers]:
    found = {}
    for name, part in _parts_with_classifier(model).items():
        kinds = (nn.Linear, CosineClassifier)
        spelt = name or "model"
        if not any(isinstance(module, kinds) for module in part.modules()):
            raise ValueError(
                f"{spelt}: expected an nn.Linear or a CosineClassifier in it, "
                f"got {type(part).__name__} without one"
            )
        last = find(part, kinds, name)
        if last.depends_on_more or not last.layers:
            raise ValueError(
                f"{spelt}: expected logits that come from nn.Linear or CosineClassifier alone, "
                f"got a {type(part).__name__} whose last ones, {list(last.layers)}, are not all"
            )
        if len(last.layers) > 1 and not _is_mean(last):
            raise ValueError(
                f"{spelt}: expected one classifier, or several whose mean is the logits, got "
                f"{list(last.layers)}"
            )
        found[name] = last
    return found


def _is_mean(last: LastLayers) -> bool:
    z = _any_outputs(last)
    logits = _computed(last, z)
    if logits is None or any(v.shape != logits.shape for v in z.values()):
        return False
    return _are_close(logits, torch.stack([*z.values()]).mean(0))


def _hands_on(last: LastLayers, shift: Tensor) -> bool:
    """Whether logits change by the shift [C] if the biases of all classifiers do. A forward that
    cannot be recorded is believed to."""
    biases = _any_outputs(last)
    shifted = {name: bias + shift.to(bias) for name, bias in biases.items()}
    before, after = (_computed(last, b, are_biases=True) for b in (biases, shifted))
    if before is None or after is None:
        return True
    return _are_close(after, before + shift.to(before))


def _check_calls(part: nn.Module, last: LastLayers, name: str) -> None:
    """What a hook or a forward that was set on a module does to the logits is not recorded."""
    for path, module in part.named_modules(prefix=name):
        compiled = "_orig_mod" in module._modules  # torch.compile sets such a forward
        changed = module._forward_hooks or ("forward" in vars(module) and not compiled)
        if changed and any(inner in last.layers.values() for inner in module.modules()):
            raise ValueError(
                f"{path or 'model'}: expected the forward of its class and no forward hooks, which "
                f"may change the logits, got a {type(module).__name__} with one"
            )


def _are_close(a: Tensor, b: Tensor) -> bool:
    tolerance = max(1e-3, 8 * torch.finfo(b.dtype).eps)
    return torch.allclose(a, b, tolerance, tolerance)


def _any_outputs(last: LastLayers) -> dict[str, Tensor]:
    """Some output [2, C] of every layer."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(2, layer.out_features, generator=generator).to(layer.weight)
        for name, layer in last.layers.items()
    }


def _computed(
    last: LastLayers, outputs: Mapping[str, Tensor], *, are_biases: bool = False
) -> Tensor | None:
    try:
        if are_biases:
            outputs = {name: _output(last.layers[name], bias) for name, bias in outputs.items()}
        return None if last.logits is None else last.logits(outputs)
    except Exception:  # what follows the layers may read more than their outputs, such as sizes
        return None


@torch.no_grad()
def _output(layer: nn.Linear, biases: Tensor) -> Tensor:
    """What the layer makes of one input with every bias [n, C]: for `nn.Linear` and input 0 the
    bias. A subclass may change it further."""
    if type(layer).forward is nn.Linear.forward:
        return biases
    ones = biases.new_ones(1, layer.in_features)  # some divide by the length
    with mode(layer, training=False):
        return torch.cat([functional_call(layer, {"bias": b}, (ones,)) for b in biases])


def _parts_with_classifier(model: nn.Module) -> dict[str, nn.Module]:
    found = {}
    for name, elf in model.named_modules():
        if isinstance(elf, ELFBase):
            for e, head in enumerate(elf.heads):
                passes_on = type(head).forward is nn.Identity.forward
                part = f"stages.{e}" if passes_on else f"heads.{e}"
                found[f"{name}.{part}".lstrip(".")] = elf.get_submodule(part)
    return found or {"": model}


def _linear(model: nn.Module, method: str) -> dict[str, nn.Linear]:
    found = classifiers(model)
    for name, classifier in found.items():
        if not isinstance(classifier, nn.Linear):
            raise TypeError(f"{name}: expected an nn.Linear for {method}, got {classifier}")
    return found  # type: ignore[return-value]


def _check_own(found: Mapping[str, nn.Linear | CosineClassifier], method: str, *names: str) -> None:
    """Weights and biases must be parameters: a value written into computed ones would be lost."""
    for name, classifier in found.items():
        for kind in names:
            value = getattr(classifier, kind, None)
            if value is not None and not isinstance(value, nn.Parameter):
                raise TypeError(
                    f"{name}: expected a {kind} that is a parameter for {method}, got a computed "
                    f"one (by learn_scales_, weight normalisation, pruning): {classifier}"
                )


def _scale(classifier: nn.Module) -> _Scale | None:
    if not parametrize.is_parametrized(classifier, "weight"):
        return None
    first = classifier.parametrizations.weight[0]  # type: ignore[union-attr,index]
    return first if isinstance(first, _Scale) else None


def use_cosine_(model: nn.Module) -> None:
    """Replaces every classifier by a newly initialised `CosineClassifier`. Those with the same
    weights get the same one. A backbone that `from_backbone` cut keeps its own classifier: only the
    ELF has the new one.

    Raises:
        TypeError: a classifier is no `nn.Linear`.
    """
    cosines: dict[Any, CosineClassifier] = {}
    for name, linear in _linear(model, "use_cosine_").items():
        weight = linear._parameters.get("weight", linear)  # no parameter if it is computed
        if weight not in cosines:
            cosine = CosineClassifier(linear.in_features, linear.out_features)
            cosines[weight] = cosine.to(linear.weight).train(linear.training)
        model.set_submodule(name, cosines[weight])


def reset_classifiers_(model: nn.Module) -> None:
    """Initialises every classifier anew, with its own `reset_parameters`.

    Raises:
        TypeError: a classifier's weight or bias is computed from other tensors.
    """
    found = classifiers(model)
    _check_own(found, "reset_classifiers_", "weight", "bias")
    for classifier in found.values():
        classifier.reset_parameters()


def train_classifiers(model: nn.Module) -> None:
    """Sets training mode for the classifiers alone; call it in place of `model.train()`. All other
    parameters are frozen, and BatchNorm and dropout elsewhere work as in evaluation. In a
    classifier with learnable scales, only the scales are trained."""
    model.requires_grad_(False)
    for module in model.modules():
        # The ELF itself needs training mode, for its exit rule in training; its stages do not.
        module.training = isinstance(module, ELFBase)
    for classifier in classifiers(model).values():
        classifier.train()
        (_scale(classifier) or classifier).requires_grad_(True)


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """w_c / ||w_c||^tau for weight [C, D] (Kang et al., arXiv 1910.09217, section 4); a class
    whose weights are all 0 keeps them."""
    checks.at_least("tau", tau, 0.0)
    norm = weight.norm(dim=1, keepdim=True)
    return weight / torch.where(norm > 0, norm, 1.0) ** tau


@torch.no_grad()
def tau_normalise_(model: nn.Module, tau: float) -> None:
    """Replaces the weights of every classifier by `tau_normalised` ones and sets its bias to 0, as
    the paper does. To try several values of tau, start from the trained weights each time: the
    function does not restore them.

    Raises:
        TypeError: a classifier is no `nn.Linear`, or its weight or bias is computed from other
            tensors.
    """
    found = _linear(model, "tau-normalisation")
    _check_own(found, "tau-normalisation", "weight", "bias")
    for weight in dict.fromkeys(linear.weight for linear in found.values()):
        weight.copy_(tau_normalised(weight, tau))
    for linear in found.values():
        if linear.bias is not None:
            linear.bias.zero_()


class _Scale(nn.Module):
    """f_c w_c, with f [C] learnable."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(like.new_ones(len(like)))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale[:, None] * weight


def learn_scales_(model: nn.Module) -> None:
    """Multiplies the weights of every classifier by a learnable scale per class, f_c w_c, that
    starts at 1 (LWS: Kang et al., arXiv 1910.09217, section 4). Until `fold_scales_` the state dict
    also holds the scales.

    Raises:
        TypeError: a classifier is no `nn.Linear`, or its weights are computed from other tensors.
        ValueError: two classifiers have the same weights.
    """
    found = _linear(model, "LWS")
    _check_own(found, "LWS", "weight")
    owners: dict[Tensor, nn.Linear] = {}
    for name, linear in found.items():
        if owners.setdefault(linear.weight, linear) is not linear:
            raise ValueError(
                f"{name}: expected weights of its own for LWS, got those of another classifier"
            )
    for linear in owners.values():
        parametrize.register_parametrization(linear, "weight", _Scale(linear.weight))


def fold_scales_(model: nn.Module) -> None:
    """Multiplies the learnt scales into the weights, and leaves plain `nn.Linear` classifiers.

    Raises:
        ValueError: a classifier has no learnable scale.
    """
    found = _linear(model, "LWS")
    for name, linear in found.items():
        if _scale(linear) is None:
            raise ValueError(f"{name}: expected scales by learn_scales_, got {linear}")
    for linear in dict.fromkeys(found.values()):
        parametrize.remove_parametrizations(linear, "weight")


class LogitAdjustment(nn.Module):
    """Logits [N, C] -> logits - tau log prior (Menon et al., arXiv 2007.07314, eq. 9), for a
    network trained with cross-entropy. At the end of a head,
    `nn.Sequential(head, LogitAdjustment(...))`, it also adjusts the logits of the exit test.

    Args:
        class_counts: [C] training samples of every class.
        tau: at least 0.
    """

    shift: Tensor

    def __init__(self, class_counts: Sequence[int] | Tensor, *, tau: float = 1.0) -> None:
        super().__init__()
        checks.at_least("tau", tau, 0.0)
        self.register_buffer("shift", (tau * log_prior(class_counts)).float())  # [C]

    def forward(self, logits: Tensor) -> Tensor:
        return logits - self.shift.to(logits.dtype)


@torch.no_grad()
def adjust_logits_(
    model: nn.Module, class_counts: Sequence[int] | Tensor, *, tau: float = 1.0
) -> None:
    """Applies `LogitAdjustment` at every exit by changing the classifiers' biases, at no cost in
    inference. A forward that torch.fx cannot record is believed to return the classifier's outputs.

    Raises:
        TypeError: a classifier is no `nn.Linear`, or its bias is computed from other tensors.
        ValueError: class_counts [C] has another C than a classifier, or a change of the biases
            changes the logits otherwise, because something follows the classifier, such as a scale
            or a hook.
    """
    adjustment = LogitAdjustment(class_counts, tau=tau)
    C = len(adjustment.shift)
    found = _linear(model, "logit adjustment")
    _check_own(found, "logit adjustment", "bias")
    for name, linear in found.items():
        if linear.out_features != C:
            raise ValueError(
                f"class_counts: expected {linear.out_features}, the classes of {name}, got {C}"
            )
    for name, last in _by_exit(model).items():
        _check_calls(model.get_submodule(name), last, name)
        if not _hands_on(last, adjustment.shift):
            raise ValueError(
                f"{name or 'model'}: expected the outputs of {list(last.layers)} as logits, got "
                f"a {type(model.get_submodule(name)).__name__} that changes them further"
            )
    for linear in found.values():
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(C))  # type: ignore[unreachable]
    for bias in dict.fromkeys(linear.bias for linear in found.values()):
        bias.copy_(adjustment.to(bias.device)(bias))
