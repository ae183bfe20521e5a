"""Packs the weights of convolutions ahead of time for code that takes any batch size.

Inductor packs weights into oneDNN's own format when it knows every size of the input. With a
dynamic batch it leaves that to every call: ResNet-18 on 32x32 images then took 2.2 times as long
with 2 and 4 images, 1.5 times with 16 and as long with 256 (two cores, AVX-512). The packed format
does not depend on the batch size from 2 up, so it can be made for the size of the example.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.experimental import symbolic_shapes

__all__ = ["packed_convolutions"]


@contextlib.contextmanager
def packed_convolutions() -> Iterator[None]:
    """Inside the block inductor packs convolutions of a dynamic batch as if it had the size of the
    example. It has no option for that, so functions of inductor are replaced. In a torch without
    them nothing happens: the code is then slower and as right.
    """
    try:
        mkldnn_fusion: Any = importlib.import_module("torch._inductor.fx_passes.mkldnn_fusion")
        has_free_symbols = mkldnn_fusion.has_free_symbols
        device_op: Any = type(mkldnn_fusion._get_mkldnn_device_op("cpu"))
        pack = device_op.pack_conv_weight
        hint = symbolic_shapes.optimization_hint
    except (ImportError, AttributeError):
        yield
        return

    def is_dynamic(value: Any) -> bool:
        is_shape_of_images = isinstance(value, torch.Size) and len(value) > 2
        return False if is_shape_of_images else has_free_symbols(value)

    def pack_for_example(self, graph, is_transposed, weight, arguments, size):
        size = [n if isinstance(n, int) else hint(n) for n in size]
        return pack(self, graph, is_transposed, weight, arguments, size)

    mkldnn_fusion.has_free_symbols = is_dynamic
    device_op.pack_conv_weight = pack_for_example
    try:
        yield
    finally:
        mkldnn_fusion.has_free_symbols = has_free_symbols
        device_op.pack_conv_weight = pack
