"""Files of other projects to our parameters and back."""

from vit_jax.weights.load import load, load_into, recognise
from vit_jax.weights.preprocessing import preparation
from vit_jax.weights.report import Report
from vit_jax.weights.save import save

__all__ = ["Report", "load", "load_into", "preparation", "recognise", "save"]
