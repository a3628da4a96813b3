"""Triton kernels for CUDA tensors; on CPU tensors they run under Triton's interpreter, for tests.

Nothing outside this folder imports Triton, and these modules are imported by the first op that runs on a GPU.
"""
