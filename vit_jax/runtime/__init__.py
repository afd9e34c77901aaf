"""Facts about the hardware, memory, profiling and compiler options."""
