"""How fast a model with exits is beside what could stand in its place, on batches of which a chosen
share goes on after each exit.

`timing` times candidates side by side, `workload` sets thresholds for a share and compacts the
batches of the oracle, `inference` and `training` say who competes, `report` prints it.
"""
