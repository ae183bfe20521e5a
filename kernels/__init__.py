"""Triton kernels, one file per operator. `row_state.py` and `survivors.py` hold what they share.

A function has the name and the arguments of its operator (`elf_fast/ops.py`). The folder is
installed as `elf_fast.kernels` and imports torch and triton only. With TRITON_INTERPRET=1 the same
kernels run on CPU tensors; tests without a GPU run them this way.
"""
