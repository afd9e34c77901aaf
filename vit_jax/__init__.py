"""Vision Transformers in JAX and Flax: train, resume, evaluate.

    import vit_jax

    result = vit_jax.train("digits")
    model = vit_jax.load("runs/digits")
    model.predict("photo.jpg")

docs/python.md describes the functions. `import vit_jax` does not import JAX; they do, when they are first used.
"""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

# When a command starts, as `vit-jax` or while Python looks for the module of `python -m vit_jax.NAME`: Ctrl-C during
# the imports prints no traceback. `commands.finish` handles it afterwards.
_is_command = sys.argv[:1] == ["-m"] or os.path.basename("".join(sys.argv[:1])) == "vit-jax"
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if TYPE_CHECKING:
    from vit_jax.api import Result, backbone, create_model, load, train
    from vit_jax.backbones import Backbone
    from vit_jax.errors import UserError
    from vit_jax.inference import Guess, Prediction, Predictor
    from vit_jax.models.vit import VisionTransformer
    from vit_jax.weights import load as load_weights

__version__ = "0.1.0"

# name -> module and the name there; imported when first used.
_LAZY = {
    **dict.fromkeys(("Result", "backbone", "create_model", "load", "train"), ("vit_jax.api", None)),
    "Backbone": ("vit_jax.backbones", None),
    **dict.fromkeys(("Guess", "Prediction", "Predictor"), ("vit_jax.inference", None)),
    "UserError": ("vit_jax.errors", None),
    "VisionTransformer": ("vit_jax.models.vit", None),
    "load_weights": ("vit_jax.weights", "load"),
}
__all__ = [
    "Backbone",
    "Guess",
    "Prediction",
    "Predictor",
    "Result",
    "UserError",
    "VisionTransformer",
    "backbone",
    "create_model",
    "load",
    "load_weights",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` when it is first used, so that --help does not wait for JAX."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
