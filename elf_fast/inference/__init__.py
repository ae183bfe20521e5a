"""Fast inference with exits: `compile` makes an `Engine` of a model."""

from .compiling import compile
from .engine import Engine
from .report import Report, StageReport

__all__ = ["Engine", "Report", "StageReport", "compile"]
