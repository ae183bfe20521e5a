"""Fast early-exit training and inference for long-tailed data (ELF, arXiv 2006.11979)."""

from typing import TYPE_CHECKING, Any

from . import backend, classifiers, functional, losses, reference, samplers
from .backend import report, use_backend
from .models import from_backbone
from .modules import ELF, ELFOutput, ExitHead, fuse, unfuse

if TYPE_CHECKING:
    from .runs.loading import load
    from .runs.saving import save

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
    "save",
    "unfuse",
    "use_backend",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` and `save` when they are first used: they need Pillow and safetensors."""
    if name == "load":
        from .runs.loading import load

        return load
    if name == "save":
        from .runs.saving import save

        return save
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
