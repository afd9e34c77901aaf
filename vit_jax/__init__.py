"""Vision Transformers in JAX and Flax: train, resume, evaluate."""

import os
import signal
import sys

# When a command starts, as `vit-jax` or while Python looks for the module of `python -m vit_jax.NAME`: Ctrl-C during
# the imports prints no traceback. `commands.finish` handles it afterwards.
_is_command = sys.argv[:1] == ["-m"] or os.path.basename("".join(sys.argv[:1])) == "vit-jax"
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__version__ = "0.1.0"
