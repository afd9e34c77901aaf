"""The machine: hardware facts, memory, compilation, profiling, and the choice of an attention backend."""
