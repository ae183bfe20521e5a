"""Chooses the exits' thresholds on validation data, and watches the traffic they serve.

`calibrate` runs a network once over validation data and chooses a `Policy`; `choose` does the same
for an `ExitTable` of anyone's own logits. docs/policy.md says which option when. `Monitor` tells
whether new data still resembles the validation data.
"""

from .artefact import FILE, Estimate, Exit, Group, Measured, Policy, PolicyError, Promise, Tried
from .calibration import Observed, calibrate, choose, observe
from .exit_table import ExitTable
from .measure import measured
from .monitor import Monitor

__all__ = [
    "FILE",
    "Estimate",
    "Exit",
    "ExitTable",
    "Group",
    "Measured",
    "Monitor",
    "Observed",
    "Policy",
    "PolicyError",
    "Promise",
    "Tried",
    "calibrate",
    "choose",
    "measured",
    "observe",
]
