"""The options of an encoder block, and what each option of a model affects."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype

from vit_jax.models.norm import EPSILON, NORMS

Affects = Literal["parameters", "head", "function", "training", "execution"]


def option(
    default: Any = dataclasses.MISSING, *, affects: Affects, parameters_by: Callable[[Any], Any] | None = None
) -> Any:
    """A dataclass field of a model together with what its value affects.

    The lists of options elsewhere are derived from this: which options have to agree for weights to be loaded into a
    model, which may differ from what a file says, which ones an exported file cannot express, and which ones are
    written to the model section of a config.

    Args:
        default: of the field; a field without one is required.
        affects: 'parameters' (which ones exist, their shapes or their meaning), 'head' (the same, of the classifier
            alone), 'function' (what is computed from the same parameters), 'training' (dropout rates and initial
            values) or 'execution' (speed, memory, rounding and the layout of the parameters).
        parameters_by: maps a value to the part of it that the parameters depend on; None for the whole value of an
            option that affects the parameters, and for nothing of any other.
    """
    return dataclasses.field(default=default, metadata={"affects": affects, "parameters_by": parameters_by})


def options_that_affect(owner: Any, *kinds: Affects) -> tuple[str, ...]:
    """Names of the options of a dataclass (or an instance) that affect one of these, in the order of its fields."""
    return tuple(field.name for field in dataclasses.fields(owner) if field.metadata.get("affects") in kinds)


def parameter_options(owner: Any) -> dict[str, Any]:
    """What the parameters of a model depend on, by option: its value, or the part of it that matters."""
    values = {}
    for field in dataclasses.fields(owner):
        part = field.metadata.get("parameters_by")
        if part is not None or field.metadata.get("affects") == "parameters":
            value = getattr(owner, field.name)
            values[field.name] = value if part is None else part(value)
    return values


def is_set(value: Any) -> bool:
    """Whether an optional value is not None."""
    return value is not None


# Not frozen, as a Flax module, which inherits these fields, must not inherit from a frozen dataclass.
@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class BlockConfig:
    """What all blocks of an encoder have in common. `VisionTransformer` inherits these fields.

    Attributes:
        heads: number of attention heads; they share the width evenly.
        mlp_width: hidden width of the MLP.
        dropout: rate after attention and inside the MLP.
        attention_dropout: rate on the attention weights.
        mlp: kind of the MLP, a key of `mlp.MLPS`: 'gelu' or 'swiglu'.
        gelu: form of the GELU, 'tanh', 'exact' or 'quick' (see `activations.gelu`).
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether queries and keys pass a LayerNorm over each head's channels (arXiv 2302.05442, section 2).
        layer_scale: initial value of the learned per-channel factors on the residual branches; None for no factors.
        parallel: whether attention and MLP read the same LayerNorm's output, instead of the MLP following attention.
        norm: kind of all norms, a key of `norm.NORMS`: 'layer' or 'rms'.
        attention_norm: whether the output of attention is normalized before its projection (arXiv 2210.06423).
        mlp_norm: whether the hidden units of the MLP are normalized before its second dense layer (arXiv 2210.06423).
        layer_norm_epsilon: added to the variance in every norm.
        dtype: compute dtype; parameters, LayerNorm statistics and softmax are float32 regardless.
        attention_kernel: attention backend, a key of `attention_backends.BACKENDS`.
        matmul_dtype: dtype of the operands of the dense layers' matmuls, where it is not `dtype` (see `Dense`).
    """

    heads: int = option(affects="parameters")
    mlp_width: int = option(affects="parameters")
    dropout: float = option(0.0, affects="training")
    attention_dropout: float = option(0.0, affects="training")
    mlp: str = option("gelu", affects="parameters")
    gelu: str = option("tanh", affects="function")
    qkv_bias: bool = option(True, affects="parameters")
    qk_norm: bool = option(False, affects="parameters")
    layer_scale: float | None = option(None, affects="parameters", parameters_by=is_set)
    parallel: bool = option(False, affects="parameters")
    norm: str = option("layer", affects="parameters")
    attention_norm: bool = option(False, affects="parameters")
    mlp_norm: bool = option(False, affects="parameters")
    layer_norm_epsilon: float = option(EPSILON, affects="function")
    dtype: Dtype = option(jnp.float32, affects="execution")  # noqa: RUF009 (the call returns a field)
    attention_kernel: str = option("plain", affects="execution")
    matmul_dtype: Dtype | None = option(None, affects="execution")  # noqa: RUF009 (likewise)

    def make_norm(self, name: str) -> nn.Module:
        """A norm as a submodule of the module that calls this; its result is in `dtype`."""
        return NORMS[self.norm](self.dtype, self.layer_norm_epsilon, name=name)

    def block_config(self) -> "BlockConfig":
        """The options of the blocks alone, of a subclass."""
        return BlockConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(BlockConfig)})
