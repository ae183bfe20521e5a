"""What results record of the machine and the software, and a setting of the allocator that makes
them repeatable.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import platform
import subprocess
from pathlib import Path


def ask(*command: str) -> str:
    """What a command prints, run in this folder; empty if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment() -> dict[str, str]:
    """Date, commit, processor, threads and versions."""
    import torch  # not at the top: `gpu.check` uses this module and starts before torch is needed

    commit = ask("git", "rev-parse", "HEAD")
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in cpuinfo.read_text().splitlines()
            if ":" in line
        )
        cpu = f"{fields.get('model name', cpu)}, family {fields.get('cpu family', '?')}"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def keep_memory() -> None:
    """Tells glibc's malloc to keep freed memory, as other allocators do.

    By default it returns large blocks to the system and gets them back page by page, in some
    processes and not in others. That gave up to 15,000 page faults in one forward of ResNet-32 with
    64 images, which then took 1.6 times as long."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of mallopt(3)
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
