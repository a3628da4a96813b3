"""C++ implementations for the CPU, behind a plain C ABI."""
