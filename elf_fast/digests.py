"""A digest of a network's weights, by which a policy knows the network it was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["of_weights"]


def of_weights(state: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of the stages and heads in the `state_dict()` of an ELF: names,
    dtypes, shapes and bytes. Thresholds and temperatures, which a policy sets, do not count."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.startswith(("stages.", "heads.")):
            continue
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
