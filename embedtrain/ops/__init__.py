"""The performance-critical operations: each is a folder with one contract and up to three implementations.

In a folder, `__init__` checks the arguments and dispatches to an implementation. `reference` is plain PyTorch and
defines the result, `native` calls the C++ kernel for the CPU, and `triton` runs on GPUs. `_backend` holds shared code.
Only `triton` modules import Triton, and the first op that runs on a GPU imports them.
"""
