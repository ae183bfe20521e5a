"""Training networks with and without exits, as `elf-fast train` does.

`trainer` has the loop and calls the others. `learner` makes optimiser steps; `schedule` makes the
optimiser and its learning rate; `processes` handles torchrun's processes; `stopping` ends a run at
a signal; `folder` locks the run's folder; `progress` and `resume` write and read checkpoints;
`results` calibrates and evaluates at the end; `log` shows progress; `ema` averages the weights.

The demo has a loop of its own (`demo/loop.py`): some twenty lines as a user would write them, on
images in memory, without files, several processes or resuming. It shows ELF in a plain training
loop, and 1,340 recorded trainings of benchmarks/accuracy depend on its exact order of random draws.
"""
