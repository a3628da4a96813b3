"""The operations that cost time: one contract a file, and up to three implementations of each.

`ops/reference/` is plain PyTorch and defines the result; `ops/native/` is C++ for the CPU, `ops/triton/` runs on GPUs.
"""
