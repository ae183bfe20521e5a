"""Chooses the exits' thresholds on validation data, and watches the traffic they serve.

`exit_table` stores the result of every exit for every sample; everything else is arithmetic on that
table. `Policy` holds what was chosen, and its file. `Monitor` tells whether new data still
resembles the validation data.
"""

from .artefact import Estimate, Exit, Group, Measured, Policy, PolicyError, Promise
from .exit_table import ExitTable
from .monitor import Monitor

__all__ = [
    "Estimate",
    "Exit",
    "ExitTable",
    "Group",
    "Measured",
    "Monitor",
    "Policy",
    "PolicyError",
    "Promise",
]
