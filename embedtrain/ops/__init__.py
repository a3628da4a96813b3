"""The operations that cost time: each is a folder with one contract and up to three implementations.

`__init__` checks the arguments and dispatches, `reference` is plain PyTorch and defines the result, `native` calls the
C++ kernel for the CPU, `triton` runs on GPUs. `_backend` holds what the ops share. Only `triton` modules import Triton,
and the first op that runs on a GPU imports them.
"""
