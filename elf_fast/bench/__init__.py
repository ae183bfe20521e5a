"""Benchmarks: the speed of a model with exits beside its alternatives, on batches of which a chosen
share goes on after each exit.

`timing` times candidates side by side, `workload` sets thresholds for a share and compacts the
batches of the oracle, `inference` and `training` define the candidates, and `command` prints the
results.
"""

#: What `elf-fast bench` times if nothing is named: a network, the side of images, and classes.
MODEL, SIZE, CLASSES = "torchvision/resnet18", 224, 1000
