"""Chooses the exits' thresholds on validation data.

`exit_table` stores the result of every exit for every sample; everything else is arithmetic on that
table. `Policy` holds what was chosen, and its file.
"""

from .artefact import Estimate, Exit, Group, Measured, Policy, PolicyError, Promise
from .exit_table import ExitTable

__all__ = [
    "Estimate",
    "Exit",
    "ExitTable",
    "Group",
    "Measured",
    "Policy",
    "PolicyError",
    "Promise",
]
