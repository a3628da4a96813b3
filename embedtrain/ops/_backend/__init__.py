"""What the ops share: which implementation runs, the native library, memory of rows, and parts of kernels."""
