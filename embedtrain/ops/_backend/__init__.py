"""Code that the ops share: dispatch, the native library, memory of rows, and parts of kernels."""
