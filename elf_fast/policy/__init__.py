"""Chooses the exits' thresholds on validation data.

`calibrate` runs a network once over validation data and chooses a `Policy`; `choose` does the same for
an `ExitTable` of anyone's own logits. docs/policy.md says which option when.
"""

from .artefact import Estimate, Exit, Group, Measured, Policy, PolicyError, Promise, Tried
from .calibration import calibrate, choose
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
    "Tried",
    "calibrate",
    "choose",
]
