"""Arrays in, arrays out: the Vision Transformer and its parts. Knows JAX and Flax alone."""
