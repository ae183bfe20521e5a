"""Targets of the operators on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from elf_fast import functional, ops, reference

from ..baselines import plain_gate, read_only
from ..inputs import LOGITS
from ..row import Row
from .compare import compare


def rows(*, full: bool) -> Iterator[Row]:
    yield from _gate(full)
    yield from _compact(full)
    yield from _head(full)
    yield from _loss(full)


def _gate(full: bool) -> Iterator[Row]:
    t, T = torch.tensor(0.9), torch.tensor(1.0)
    targets = {(16, 10): 2.0, (64, 100): 2.0, (256, 1000): 5.0}
    others = ((1, 10), (1, 1000), (16, 8142), (256, 8142), (1024, 100)) if full else ()
    for N, C in (*LOGITS, *others):
        passes = 1 / 3 if (N, C) == (1024, 1000) else None
        x = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) * 3
        ours, theirs = functional.exit_gate(x, 0.9), reference.exit_gate(x, 0.9)
        assert torch.equal(ours.survivors, theirs.survivors)
        candidates: dict[str, Callable[[], Any]] = {
            "functional.exit_gate": lambda x=x: functional.exit_gate(x, 0.9),
            "ops.exit_gate, early stop": lambda x=x: ops.exit_gate(x, t, T, 0, None, True),
            "reference": lambda x=x: reference.exit_gate(x, 0.9),
            "plain PyTorch": lambda x=x: plain_gate(x, 0.9),
            "read-only pass": lambda x=x: read_only(x),
        }
        with torch.inference_mode():
            yield from compare(
                "kernels", f"logits [{N}, {C}]", candidates,
                [("functional.exit_gate", "reference", targets.get((N, C))),
                 ("functional.exit_gate", "plain PyTorch", None),
                 ("functional.exit_gate", "read-only pass", passes),
                 ("ops.exit_gate, early stop", "read-only pass", None)],
                seconds=1, apart=True,
            )  # fmt: skip


#: Shapes of the features of a batch at an exit.
FEATURES = {
    "ResNet-32 layer1": (64, 16, 32, 32),
    "ResNet-50 layer2": (32, 512, 28, 28),
    "ResNet-50 layer4": (64, 2048, 7, 7),
}
TOKENS = {"ViT-B": (32, 197, 768)}


def _laid_out(features: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Random features by name and memory format."""
    for name, size in features.items():
        for layout in (torch.contiguous_format, torch.channels_last)[: len(size) - 2]:
            label = str(layout).removeprefix("torch.").removesuffix("_format").replace("_", "-")
            yield f"{name} {label}", torch.randn(size).to(memory_format=layout)


def _compact(full: bool) -> Iterator[Row]:
    for name, x in _laid_out(FEATURES | TOKENS if full else FEATURES):
        for share in (0.1, 0.5, 0.9) if full else (0.5,):
            n = round(share * len(x))
            survivors = torch.linspace(0, len(x) - 1, n).long()
            candidates: dict[str, Callable[[], Any]] = {
                "ops.compact": lambda x=x, s=survivors: ops.compact(x, s),
                "functional.compact": lambda x=x, s=survivors: functional.compact(x, s),
                "ops.compact_ (in place)": lambda x=x, s=survivors: ops.compact_(x, s, None),
                "index_select": lambda x=x, s=survivors: x.index_select(0, s),
                "copy": lambda x=x, n=n: x[:n].clone(),
            }
            assert torch.equal(functional.compact(x, survivors), x[survivors])
            with torch.inference_mode():
                yield from compare(
                    "kernels", f"{share:g} of {name}", candidates,
                    [("ops.compact", "index_select", 5.0 if "channels" in name else 1.0),
                     ("functional.compact", "index_select", None),
                     ("ops.compact_ (in place)", "ops.compact", None),
                     ("ops.compact", "copy", None)],
                    seconds=1, apart=True,
                )  # fmt: skip


def _head(full: bool) -> Iterator[Row]:
    features = {"digits layer2": (256, 64, 4, 4), **FEATURES}
    for name, x in _laid_out(features | TOKENS if full else features):
        D = x.shape[2 if x.dim() == 3 else 1]
        w, b = torch.randn(100, D), torch.randn(100)
        candidates: dict[str, Callable[[], Any]] = {
            "functional.exit_head": lambda x=x, w=w, b=b: functional.exit_head(x, w, b, 0.9),
            "reference": lambda x=x, w=w, b=b: reference.exit_head(x, w, b, 0.9),
            "read-only pass": lambda x=x: read_only(x),
        }
        with torch.inference_mode():
            ours, theirs = (candidates[k]().logits for k in ("functional.exit_head", "reference"))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            yield from compare(
                "kernels", name, candidates,
                [("functional.exit_head", "reference", None),
                 ("functional.exit_head", "read-only pass", None)],
                seconds=1, apart=True,
            )  # fmt: skip


def _loss(full: bool) -> Iterator[Row]:
    for N, C in ((16, 10), (64, 100), (256, 1000), *([(64, 8142)] if full else [])):
        x = (torch.randn(N, C) * 3).requires_grad_()
        y = torch.randint(0, C, (N,))

        def step(f: Callable[..., Any], x=x, y=y) -> Tensor:
            x.grad = None
            f(x, y, threshold=0.9).loss.sum().backward()
            return x.grad

        candidates: dict[str, Callable[[], Any]] = {
            "exit_loss, forward + backward": lambda s=step: s(functional.exit_loss),
            "reference": lambda s=step: s(reference.exit_loss),
        }
        ours, theirs = (f() for f in candidates.values())
        torch.testing.assert_close(ours, theirs)
        logits = x.detach()
        candidates["copy"] = lambda x=logits: x.clone()
        yield from compare(
            "kernels", f"logits [{N}, {C}]", candidates,
            [("exit_loss, forward + backward", "reference", None),
             ("exit_loss, forward + backward", "copy", None)],
            apart=True,
        )  # fmt: skip
