"""Vision Transformers in JAX and Flax: train, resume, evaluate."""

__version__ = "0.1.0"
