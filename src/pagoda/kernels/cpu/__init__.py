"""The C++ kernels for CPUs: how they are built, how weights are laid out for them, and their tables."""
