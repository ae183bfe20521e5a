"""Fast inference with exits: `compile` makes an `Engine` of a model, and a `Scheduler` lets
requests share its batches."""

from .compiling import compile
from .core import SchedulerCore
from .engine import Engine
from .report import Report, StageReport
from .request import DeadlineExceeded, QueueFull, Request, SchedulerClosed
from .scheduler import Scheduler

__all__ = [
    "DeadlineExceeded",
    "Engine",
    "QueueFull",
    "Report",
    "Request",
    "Scheduler",
    "SchedulerClosed",
    "SchedulerCore",
    "StageReport",
    "compile",
]
