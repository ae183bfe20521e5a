"""Triton kernels, one file per operator; installed as `elf_fast.kernels`. Imports torch and triton
only."""
