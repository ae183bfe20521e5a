"""Fast early-exit training and inference for long-tailed data (ELF, arXiv 2006.11979)."""

from . import backend, classifiers, functional, losses, reference, samplers
from .backend import report, use_backend
from .models import from_backbone
from .modules import ELF, ELFOutput, ExitHead, fuse, unfuse

__all__ = [
    "ELF",
    "ELFOutput",
    "ExitHead",
    "backend",
    "classifiers",
    "from_backbone",
    "functional",
    "fuse",
    "losses",
    "reference",
    "report",
    "samplers",
    "unfuse",
    "use_backend",
]

__version__ = "0.1.0"
