"""`elf-fast doctor`"""

from __future__ import annotations

import argparse
import platform
from typing import Any


def add(commands: Any) -> argparse.ArgumentParser:
    return commands.add_parser(
        "doctor",
        help="show which kernels serve each device, and why",
        description="Prints versions and devices, which kernels serve each device, and why.",
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import __version__, report

    print(f"elf_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU: {platform.machine()}, {torch.get_num_threads()} threads for torch")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"GPU {i}: {torch.cuda.get_device_name(i)}")
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        print(f"GPU: none that torch can use (torch is {built})")
    for key, line in report().items():
        print(f"{'chosen backend' if key == 'chosen' else f'{key} tensors'}: {line}")
    return 0
