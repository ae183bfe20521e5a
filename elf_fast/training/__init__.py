"""Training, calibration and evaluation of ELF on long-tailed data.

`elf-fast train`: config -> build, distributed, ema, snapshot, log, position -> evaluate -> trainer.
`elf-fast demo`: network, summary, throughput -> loop, figures -> report -> demo. Both: calibrate,
checkpoint. Each file has one subject; `trainer.Trainer` and `demo.run` show how they fit together.
"""
