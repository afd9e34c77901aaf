"""The shape of every parameter of a model, by its path: reckoned, as tracing the model would take longer than loading.

A test holds it against what `VisionTransformer` makes, field by field.
"""

from collections.abc import Mapping

from vit_jax.models.resnet import EXPANSION, stem_output
from vit_jax.models.vit import VisionTransformer, position_at

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(model: VisionTransformer, grid: tuple[int, int] | None, channels: int) -> Shapes:
    """Paths ('encoder/block_0/mlp/up/kernel') and shapes; blocks one by one, whether the model is scanned or not.

    Args:
        model: the model.
        grid: rows and columns of patches; None where no parameter depends on them.
        channels: values a pixel.
    """
    width = model.width
    pixels = channels if model.stem is None else stem_output(model.stem, model.stem_width, (64, 64))[2]
    shapes = {} if model.stem is None else _stem(model.stem, model.stem_width, channels)
    shapes |= _dense("embedding/projection", model.patch_size**2 * pixels, width - model.position_width)
    if model.class_token:
        shapes["class_token"] = (1, 1, width)
    if model.registers:
        shapes["registers"] = (1, model.registers, width)
    at = position_at(model)
    if at != "layers":
        shapes |= _positions("positions", model, grid)
    for index in range(model.depth):
        shapes |= _block(f"encoder/block_{index}", model)
        if at == "layers":
            shapes |= _positions(f"encoder/block_{index}/positions", model, grid)
    shapes |= _norm("norm" if model.norm_after_pooling else "encoder/norm", width)
    if model.pooling == "map":
        shapes |= {"pooling/probe": (1, 1, width)}
        shapes |= _dense("pooling/query", width, width) | _dense("pooling/key_value", width, 2 * width)
        shapes |= _dense("pooling/out", width, width) | _norm("pooling/norm", width)
        shapes |= _dense("pooling/mlp/up", width, model.mlp_width) | _dense("pooling/mlp/down", model.mlp_width, width)
    return shapes | head_shapes(model)


def head_shapes(model: VisionTransformer) -> Shapes:
    """Those of the classifiers alone."""
    shapes = {}
    for name, classes in heads(model.classes).items():
        path = f"head/{name}".rstrip("/")
        if model.pre_logits is not None:
            shapes |= _dense(f"{path}/pre_logits", model.width, model.pre_logits)
        shapes |= _dense(f"{path}/logits", model.pre_logits or model.width, classes)
    return shapes


def heads(classes: int | Mapping[str, int] | None) -> dict[str, int]:
    """The classes of every head by its name; the only one of a model has the name ''."""
    if classes is None:
        return {}
    return dict(classes) if isinstance(classes, Mapping) else {"": classes}


def _dense(path: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{path}/kernel": (inputs, outputs), **({f"{path}/bias": (outputs,)} if bias else {})}


def _norm(path: str, width: int) -> Shapes:
    return {f"{path}/scale": (width,), f"{path}/bias": (width,)}


def _block(path: str, model: VisionTransformer) -> Shapes:
    width, hidden = model.width, model.mlp_width
    norms = ("norm",) if model.parallel else ("norm_attention", "norm_mlp")
    shapes = {key: shape for name in norms for key, shape in _norm(f"{path}/{name}", width).items()}
    shapes |= _dense(f"{path}/attention/qkv", width, 3 * width, model.qkv_bias)
    shapes |= _dense(f"{path}/attention/out", width, width)
    if model.qk_norm:
        shapes |= _norm(f"{path}/attention/norm_queries", width // model.heads)
        shapes |= _norm(f"{path}/attention/norm_keys", width // model.heads)
    gated = model.mlp == "swiglu"
    shapes |= _dense(f"{path}/mlp/{'gate_up' if gated else 'up'}", width, hidden * (2 if gated else 1))
    shapes |= _dense(f"{path}/mlp/down", hidden, width)
    if model.layer_scale is not None:
        scales = ("scale",) if model.parallel else ("scale_attention", "scale_mlp")
        shapes |= {f"{path}/{name}/scale": (width,) for name in scales}
    return shapes


def _positions(path: str, model: VisionTransformer, grid: tuple[int, int] | None) -> Shapes:
    if model.position not in ("learned", "learned_2d", "relative"):
        return {}
    rows, columns = grid
    if model.position == "learned":
        return {f"{path}/table": (1, int(model.class_token) + rows * columns, model.width)}
    if model.position == "learned_2d":
        return {f"{path}/rows": (rows, model.width // 2), f"{path}/columns": (columns, model.width // 2)}
    return {f"{path}/offsets": (model.heads, 2 * rows - 1, 2 * columns - 1)}


def _stem(units: tuple[int, ...], width: int, channels: int) -> Shapes:
    shapes = {"stem/convolution_root/kernel": (7, 7, channels, width), **_norm("stem/norm_root", width)}
    inputs = width
    for stage, count in enumerate(units):
        inner = width * 2**stage
        for unit in range(count):
            path, wide = f"stem/stage_{stage}_unit_{unit}", EXPANSION * inner
            sizes = {"1": (1, inputs, inner), "2": (3, inner, inner), "3": (1, inner, wide)}
            # As the unit has it: its residual is projected where the shape changes.
            if inputs != wide or (stage > 0 and unit == 0):
                sizes["projection"] = (1, inputs, wide)
            for name, (side, before, after) in sizes.items():
                shapes[f"{path}/convolution_{name}/kernel"] = (side, side, before, after)
                shapes |= _norm(f"{path}/norm_{name}", after)
            inputs = wide
    return shapes
