"""Training networks with and without exits, as `elf-fast train` does.

`trainer` is the loop and shows how the rest fits together: `learner` makes steps, `schedule` has
the optimiser and its rate, `processes` those of torchrun, `progress` and `resume` what a checkpoint
holds, `results` what is measured at the end, `log` what is shown, `ema` the average of the weights.

The demo has a loop of its own (`demo/loop.py`): some twenty lines as a user would write them, on
images in memory, without files, processes or resumption. It shows ELF in a plain training loop, and
1,340 recorded trainings of benchmarks/accuracy depend on its exact order of random draws.
"""
