"""Rules that say, by parameter name, how the training state is laid out on the mesh."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

# Pairs of a regular expression, which must match the whole parameter name, and a layout; the first match applies.
# For example, fully sharded data parallelism of the MLPs: ((".*/mlp/.*/kernel", PartitionSpec("data")), (".*",
# PartitionSpec())).
Rules = tuple[tuple[str, PartitionSpec], ...]
RULES: Rules = ((".*", PartitionSpec()),)


def state_sharding(shapes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns a tree of NamedSharding with the structure of `shapes`.

    The tree may be the parameters or contain them any number of times, as a training state does: the name of a leaf is
    made of the dictionary keys at the end of its path, so Adam's moments of 'encoder/block_0/mlp/up/kernel' are laid
    out as that parameter is. Scalars are always replicated.

    Args:
        shapes: tree of arrays or `jax.ShapeDtypeStruct`s.
        mesh: the devices.
        rules: see `Rules`.

    Raises:
        ValueError: no rule matches a name, or an array cannot be divided as its rule says.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        name = _parameter_name(path)
        spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, name)), None)
        if spec is None:
            raise ValueError(f"no sharding rule matches {name!r}\n  end the rules with ('.*', PartitionSpec())")
        _check_divisible(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _parameter_name(path: tuple[Any, ...]) -> str:
    keys = []
    for key in reversed(path):
        if not isinstance(key, DictKey):
            break
        keys.append(str(key.key))
    return "/".join(reversed(keys))


def _check_divisible(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"{name} has shape {shape}, which {spec} does not fit: it has {len(spec)} axes")
    for axis, (size, mesh_axes) in enumerate(zip(shape, spec, strict=False)):
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        parts = 1
        for mesh_axis in names:
            parts *= mesh.shape[mesh_axis]
        if size % parts:
            raise ValueError(
                f"{name} has shape {shape}: axis {axis} of size {size} cannot be divided among {parts} devices ({spec})"
            )
