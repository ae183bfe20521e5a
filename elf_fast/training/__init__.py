"""Training, calibration and evaluation of ELF on long-tailed data, as `elf-fast demo` runs them.

network, checkpoint, calibrate, summary, throughput -> loop, figures -> report ->
demo. Each file has one subject; `demo.run` shows how they fit together.
"""
