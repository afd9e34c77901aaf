"""Finds the models in a file by the names of its arrays, whatever stands before the names.

A file may have its model below wrappers (module., _orig_mod., teacher.backbone.), several models (student and teacher,
parameters and their average), and arrays of no model. A family (google, timm, huggingface) recognizes a model by
the names of its blocks, `BLOCK`. What stands before them is the prefix of the model.
"""

import collections
import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from vit_jax.errors import UserError, few
from vit_jax.weights import namings, other_arrays
from vit_jax.weights.describe import Description
from vit_jax.weights.files import Stored
from vit_jax.weights.naming import Naming
from vit_jax.weights.rules import LINEAR, Rule

# Parts of names that DistributedDataParallel, torch.compile, FSDP and recomputed layers insert, at any depth.
_INSERTED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
_MAX_MODELS = 100
Family = ModuleType | Naming
_AVERAGES = r"teacher|ema|momentum|target|average"  # the usual choice among several models


@dataclasses.dataclass(frozen=True)
class Tower:
    """A model in a file.

    Attributes:
        family: the module that reads its names.
        base: the parts of its names in the file before those that the family knows.
        prefix: all that stands before its blocks in the file, with dots.
    """

    family: Family
    base: tuple[str, ...]
    prefix: str

    def has(self, name: str) -> bool:
        """Whether a name in the file starts with the base, and does not continue as in Hugging Face's encoder.layer."""
        parts = _parts(name)
        start, rest = tuple(parts[: len(self.base)]), parts[len(self.base) :]
        return start == self.base and not (start[-1:] == ("encoder",) and rest[:1] == ["layer"])

    def short(self, name: str) -> str:
        """A name of the file as the family knows it."""
        parts = [part for part in _parts(name)[len(self.base) :] if part not in _INSERTED]
        # DINOv2's training code stores blocks in groups: blocks.0.3 is block 3.
        return re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", self.family.SEPARATOR.join(parts))

    def has_embedding(self, names: Iterable[str]) -> bool:
        """Whether the file has a part of the model's patch embedding."""
        return any(re.match(self.family.EMBEDDING, self.short(name)) for name in names if self.has(name))


def describe(
    stored: Stored, families: Sequence[Family], prefix: str | None, overrides: Mapping[str, Any]
) -> Description:
    """The description of the only model in a file, or of the one whose names start with `prefix`.

    Args:
        stored: the file.
        families: modules or namings that each read one naming convention.
        prefix: as the user gave it; None for the only model.
        overrides: as for the families' `describe`.

    Raises:
        UserError: there is no model, or several; or as the family's `describe`.
    """
    towers = _find(stored.shapes, families)
    tower = _choose(towers, prefix, stored)
    names, ignored, heads, left = _sort(stored, tower, [other for other in towers if other is not tower])
    if prefix is not None:  # the user knows that there is more in the file
        ignored |= dict.fromkeys((*heads, *left), "outside the chosen model")
        heads, left = [], []
    view = dataclasses.replace(
        stored,
        prefix=".".join(tower.base),
        shapes={short: stored.shapes[name] for short, name in names.items()},
        dtypes={short: stored.dtypes[name] for short, name in names.items()},
    )
    is_trunk = tower.base[-1:] == ("trunk",)
    if is_trunk:
        view = dataclasses.replace(view, config=namings.trunk_config(stored) or stored.config)
    below = f"below {view.prefix}: " if tower.base else ""
    try:
        other_arrays.refuse_parts(view.shapes, view.dtypes)
        found = tower.family.describe(view, overrides)
    except UserError as error:
        outside = f"\n  not below {view.prefix}: {few(left, 6)}" if left else ""
        raise UserError("\n".join(f"{below}{error}{outside}".split("\n")[:3])) from None
    if left:
        raise UserError(
            f"{below}a model, but these arrays outside it are unexpected: {few(left, 6)}"
            f"\n  to load it without them: {_how(stored, tower.prefix)}"
        )
    refusal = found.head_refusal
    rules = tuple(dataclasses.replace(rule, names=tuple(names[short] for short in rule.names)) for rule in found.rules)
    if is_trunk and found.model.classes is None and refusal is None:
        projection = [name for name in heads if _parts(name) == [*tower.base[:-1], "head", "proj", "weight"]]
        found, more = _with_projection(found, projection, stored)
        rules, heads = rules + more, [name for name in heads if name not in projection]
    start = [*tower.base[:-1], "head", "mlp"]
    layers = [name for name in ignored if is_trunk and _parts(name)[: len(start)] == start]
    if layers and refusal is None:
        refusal = f"{few(layers, 2)}: a projection of several layers, which is not supported"
    if heads:
        ignored |= dict.fromkeys(heads, "a head that is not supported: it is outside the model")
        if found.model.classes is None and refusal is None:
            refusal = f"{few(heads, 2)}: a head outside the model, so that what it reads is unknown"
    ignored |= {names[short]: why for short, why in found.ignored.items()}
    return dataclasses.replace(
        found, rules=rules, ignored={name: ignored[name] for name in sorted(ignored)}, head_refusal=refusal
    )


def _with_projection(found: Description, projection: list[str], stored: Stored) -> tuple[Description, tuple[Rule, ...]]:
    """A tower of timm in a file of OpenCLIP, with the projection next to it as its head, if there is one."""
    if not projection or len(stored.shapes[projection[0]]) != 2:
        return found, ()
    found = dataclasses.replace(
        found,
        model=found.model.clone(classes=stored.shapes[projection[0]][0]),
        zeros={**found.zeros, "head/logits/bias": "the file's layers have no such bias"},
        notes=(*found.notes, namings.PROJECTION),
    )
    return found, (Rule((projection[0],), ("head/logits/kernel",), LINEAR),)


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


def _find(shapes: Iterable[str], families: Sequence[Family]) -> list[Tower]:
    """The models in a file, in the order of their prefixes.

    A model without a patch embedding is one only if it is alone, so that the family can say what is missing.
    """
    names, found = sorted(shapes), {}
    for name in names:
        for family in families:
            root = _root(name, family)
            if root is not None:
                found.setdefault(root, {}).setdefault(id(family), family)
    if len(found) > _MAX_MODELS:
        raise UserError(
            f"it has blocks below more than {_MAX_MODELS} prefixes: {few(map('.'.join, sorted(found)))}\n"
            "  use the file of one model"
        )
    roots = _families(names, {root: list(some.values()) for root, some in found.items()})
    bases = collections.Counter(_base(root, family) for root, family in roots.items())
    towers = []
    for root, family in sorted(roots.items()):
        base = _base(root, family)
        towers.append(Tower(family, root if bases[base] > 1 else base, ".".join(root)))
    return [tower for tower in towers if tower.has_embedding(names)] or (towers if len(towers) == 1 else [])


def _families(names: Sequence[str], found: Mapping[tuple[str, ...], list[Family]]) -> dict[tuple[str, ...], Family]:
    """The family of each root, of those whose blocks have such names: the first whose patch embedding is there.

    Roots without one are omitted, unless there is none with one.
    """
    roots = {}
    for root, families in found.items():
        with_embedding = (one for one in families if Tower(one, _base(root, one), "").has_embedding(names))
        family = next(with_embedding, None)
        if family is not None:
            roots[root] = family
    return roots or {root: families[0] for root, families in found.items()}


def _root(name: str, family: Family) -> tuple[str, ...] | None:
    """The parts before those of a block, if the name is of one; None for an optimizer, whose arrays have such names."""
    parts = _parts(name)
    kept = [index for index, part in enumerate(parts) if part not in _INSERTED]
    match = re.match(rf"((?:[^.]+\.)*?){family.BLOCK}", ".".join(parts[index] for index in kept))
    if match is None or re.search(other_arrays.OPTIMIZER, match[1]):
        return None
    return tuple(parts[: kept[match[1].count(".")]])


def _base(root: tuple[str, ...], family: Family) -> tuple[str, ...]:
    """The root without the family's own part, next to which the head is: vit. next to classifier."""
    end = len(root)
    while end and root[end - 1] in _INSERTED:
        end -= 1
    return root[: end - 1] if end and root[end - 1] in family.INNER else root


def _relative(name: str, tower: Tower) -> str:
    """A name outside a tower without the parts that it shares with the tower's names, and those that are inserted.

    big_vision's params/t stays so.
    """
    parts, base, before = _parts(name), list(tower.base), []
    while parts and base and parts[0] == base[0]:
        before, parts, base = parts[:1], parts[1:], base[1:]
    parts = before + parts if before == ["params"] else parts
    return ".".join(part for part in parts if part not in _INSERTED)


def _choose(towers: list[Tower], prefix: str | None, stored: Stored) -> Tower:
    if not towers:
        other_arrays.refuse_parts(stored.shapes, stored.dtypes)
        what = other_arrays.kind(stored.shapes)
        raise UserError(
            f"not a known Vision Transformer, by the names of its arrays: {few(sorted(stored.shapes), 6)}\n"
            + (f"  the names are those of {what}, which is not supported\n" if what else "")
            + "  allowed: files of Google, timm, Hugging Face, OpenAI, OpenCLIP and torchvision (docs/weights.md), and "
            "workdirs of training runs"
        )
    shown = few([tower.prefix or '""' for tower in towers], 6)
    if prefix is None:
        if len(towers) == 1:
            return towers[0]
        usual = next((tower for tower in towers if re.search(_AVERAGES, tower.prefix)), towers[0])
        raise UserError(f"it has {len(towers)} models: {shown}\n  choose one: {_how(stored, usual.prefix)}")
    wanted = ".".join(_parts(prefix.rstrip("./")))
    found = [tower for tower in towers if wanted == tower.prefix]
    found = found or [tower for tower in towers if wanted == ".".join(tower.base)]
    found = found or [tower for tower in towers if f"{tower.prefix}.".startswith(f"{wanted}.")]
    if len(found) != 1:
        raise UserError(
            f"prefix {prefix!r} is the start of {len(found) or 'no'} model{'s' if found else ''}\n  allowed: {shown}"
        )
    return found[0]


def _how(stored: Stored, prefix: str) -> str:
    """What to type to choose a model of the file."""
    name = f"{stored.path.name.split('.')[0]}-{prefix.split('.')[0] or 'alone'}.safetensors"
    arguments = shlex.join([str(stored.path), str(stored.path.with_name(name)), f"--prefix={prefix}"])
    return f"weights.load(..., prefix={prefix!r}), or\n  python -m vit_jax.convert {arguments}"


def _sort(
    stored: Stored, tower: Tower, others: list[Tower]
) -> tuple[dict[str, str], dict[str, str], list[str], list[str]]:
    """The file's arrays: the tower's names by those of its family, why others are ignored, heads outside, the rest."""
    names, ignored, heads, left = {}, {}, [], []
    for name in sorted(stored.shapes):
        other = next((other for other in others if other.has(name) and len(other.base) >= len(tower.base)), None)
        inside = tower.has(name) and other is None
        short = tower.short(name) if inside else _relative(name, tower)
        own = inside and 0 not in stored.shapes[name] and re.match(getattr(tower.family, "OWN", "(?!)"), short)
        why = None if own else other_arrays.why_ignored(short, stored.shapes[name], stored.dtypes[name])
        if why is None and other is None and not inside:
            other = next((other for other in others if other.has(name)), None)
        if other is not None and (other.base or why is None):
            ignored[name] = f"of another model in the file, {other.prefix or 'without a prefix'}"
        elif why is not None:
            ignored[name] = why
        elif other_arrays.is_classifier(short) and not (inside and re.match(tower.family.CLASSIFIER, short)):
            heads.append(name)
        elif not inside:
            left.append(name)
        elif short in names:
            raise UserError(f"{names[short]} and {name} are both {short}\n  remove one of them from the file")
        else:
            names[short] = name
    return names, ignored, heads, left
