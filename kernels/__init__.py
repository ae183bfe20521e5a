"""Triton kernels, one file per operator, and `gate.py` with what they share. A function has the
name and the arguments of its operator (`elf_fast/ops.py`). Installed as `elf_fast.kernels`; imports
torch and triton only.

With TRITON_INTERPRET=1 the same kernels run on CPU tensors, which is how they are tested without a
GPU.
"""
