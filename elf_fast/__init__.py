"""Fast early-exit training and inference for long-tailed data (ELF, arXiv 2006.11979)."""

from typing import TYPE_CHECKING, Any

from . import backend, classifiers, functional, losses, reference, samplers
from .backend import report, use_backend
from .models import from_backbone
from .modules import ELF, ELFOutput, ExitHead, fuse, unfuse

if TYPE_CHECKING:
    from .runs.loading import load

__all__ = [
    "ELF",
    "ELFOutput",
    "ExitHead",
    "backend",
    "classifiers",
    "from_backbone",
    "functional",
    "fuse",
    "load",
    "losses",
    "reference",
    "report",
    "samplers",
    "unfuse",
    "use_backend",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` when it is first used: it needs Pillow and safetensors, the rest does not."""
    if name == "load":
        from .runs.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
