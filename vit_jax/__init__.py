"""Vision Transformers in JAX and Flax: train, resume, evaluate."""

import signal
import sys

# While Python looks for the module of `python -m vit_jax.NAME`: Ctrl-C during the imports prints no traceback.
# `commands.finish` handles it afterwards.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__version__ = "0.1.0"
