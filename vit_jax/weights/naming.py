"""Reads image towers of other projects by tables of names: `namings.py` has one `Naming` per project.

A table maps our layers to the start of the names of a project's arrays. What a file has of them determines the model.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import rules
from vit_jax.weights.describe import Choices, Description, Names, check_config, check_names, pair
from vit_jax.weights.files import Stored
from vit_jax.weights.rules import Rule, dense, norm
from vit_jax.weights.timm_rules import relative_grid, relative_table

RELATIVE = ("block/positions", "positions")  # of each block, or the same in all
QKV = "block/attention/qkv"
GATED, PLAIN = "block/mlp/gate_up", "block/mlp/up"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the JSON files beside an array file say of its model; None for what they do not say.

    Attributes:
        values: by option of the model ('heads', 'gelu', 'layer_norm_epsilon', 'pooling'), and 'image_size'.
        sizes: values by key that must be those of the file: 'width', 'depth', 'registers'; each with its key there.
        by: where the values are from, by option, if not from config.json.
    """

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    by: Mapping[str, str] = dataclasses.field(default_factory=dict)


def nothing_recorded(stored: Stored) -> Recorded:
    """What there is beside files of projects that write no JSON files."""
    return Recorded()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """The names of one project's arrays and its conventions: a family, as the module timm.py is one (see towers.py).

    Attributes:
        LABEL: the naming convention, in words.
        BLOCK, INNER: how a model is recognized in a file, as in timm.py.
        embedding: the same, of its patch embedding, below one of INNER or not.
        family: whose models they are, in words.
        block: start of a block's names; '{}' stands for its index.
        names: for layers and parameters by our path, with 'block/' for those of every block, the start of the names;
            several that are fused are separated by a space. Of heads, outside INNER.
        optional: pattern of the paths of those that a file may lack.
        biasless: pattern of the paths, up to '/bias', of layers that may lack a bias.
        classifier: start of the names of a classifier that reads the mean of the patches, in place of the table's
            head; '' if there is none. What it does not read is `unread`, a pattern of paths.
        refused: what is not supported of a head, by the start of its names: the model is then read without it.
        fields: of the model, where the project's models have other values than ours by default.
        gelu, epsilon: conventions.
        heads: usual number of heads by width, if not 64 channels each.
        recorded: what the JSON files beside an array file say.
        head_note: what a user should know of the head.
        resampling: as in `Description`.

    Alternatives of a name are separated by '|'.
    """

    LABEL: str
    BLOCK: str
    INNER: tuple[str, ...] = ()
    SEPARATOR: str = "."
    embedding: str
    family: str
    block: str
    names: Mapping[str, str]
    optional: str = "head/.*"
    biasless: str = "(?!)"
    classifier: str = ""
    unread: str = "(?!)"
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gelu: str = "exact"
    epsilon: float = 1e-6
    heads: Mapping[int, int] = dataclasses.field(default_factory=dict)
    recorded: Callable[[Stored], Recorded] = nothing_recorded
    head_note: str = ""
    resampling: str = "bicubic_no_antialias"  # of transformers

    @property
    def EMBEDDING(self) -> str:  # noqa: N802 (as in a module)
        """Pattern of the names of its patch embedding."""
        return rf"(?:(?:{'|'.join(self.INNER)})\.)?{self.embedding}" if self.INNER else self.embedding

    @property
    def OWN(self) -> str:  # noqa: N802 (as in a module)
        """Pattern of the names in the table."""
        starts = [part for value in self.names.values() for part in re.split("[ |]", value)]
        inner, block = "|".join(rf"{start}\." for start in self.INNER), _pattern(self.block, "|")
        starts += [self.classifier] if self.classifier else []
        return rf"(?:{inner})?(?:{block})?(?:{'|'.join(map(_pattern, starts))})"

    @property
    def CLASSIFIER(self) -> str:  # noqa: N802 (as in a module)
        """Pattern of the names of heads that are in the table."""
        return self.OWN

    def describe(self, stored: Stored, overrides: Mapping[str, Any]) -> Description:
        """The description of a file.

        Raises:
            UserError: it is not a complete model, has parts that are not supported, or lacks a value of `overrides`.
        """
        names, choices, recorded = Names(stored.shapes, "", self.LABEL), Choices(overrides), self.recorded(stored)
        inside = ["", *(f"{start}." for start in self.INNER)]
        inner = next((start for start in inside if names.any(re.escape(start) + self.embedding)), "")
        found = self.found(names, inner)
        ignored = {}
        classifies = bool(self.classifier) and names.any(_pattern(self.classifier))
        if classifies:
            unread = [found.pop(key) for key in list(found) if re.fullmatch(self.unread, key)]
            found = {key: starts for key, starts in found.items() if not key.startswith("head/")}
            found["head/logits"] = (self.classifier,)
            ignored = {
                name: "the classifier does not read it"
                for starts in unread
                for name in names
                if name.startswith(starts)
            }
        refusal = None
        for start, why in self.refused.items():
            refused = [name for name in names if name.startswith(inner + start)]
            ignored |= dict.fromkeys(refused, f"a head that is not supported: {why}")
            refusal = f"{inner}{start}...: {why}, which is not supported" if refused else refusal
        depth = depth_of(names, found)
        size = recorded.values.get("image_size")
        grid = next((_relative_grid(names, found[key][0].format(0)) for key in RELATIVE if key in found), None)
        table, zeros = self.rules_of(names, found, depth)
        check_names(stored.shapes, table, ignored, (), self.LABEL)
        model, channels = self._model(names, found, depth, classifies, table, recorded, choices)
        if "positions/table" in found and grid is not None:
            raise UserError(
                f"{found['positions/table'][0]}: positions at the input and in the layers are not supported together\n"
                "  use a model of docs/weights.md"
            )
        if "positions/table" in found:
            rows = names.shape_of(found["positions/table"][0])[-2] - int(model.class_token)
            grid = choices.grid(rows, model.patch_size, size)
        return Description(
            self.LABEL,
            model,
            channels,
            grid,
            tuple(table),
            ignored,
            decisions=tuple(choices.made),
            notes=(self.head_note,) if self.head_note and model.classes is not None and not classifies else (),
            head_refusal=refusal,
            recorded_size=pair(size) if grid is None else None,
            zeros=zeros,
            resampling=self.resampling,
        )

    def found(self, names: Names, inner: str) -> dict[str, tuple[str, ...]]:
        """The starts of a file's names by our paths, with '{}' for a block's index; required ones even if missing."""
        block = next((one for one in self.block.split("|") if names.any(_pattern(inner + one))), self.block)
        found = {}
        for key, value in self.names.items():
            before = "" if key.startswith("head/") else inner + (block if key.startswith("block/") else "")
            alternatives = [tuple(before + part for part in one.split(" ")) for one in value.split("|")]
            there = [one for one in alternatives if names.any("|".join(map(_pattern, one)))]
            if there or not re.fullmatch(self.optional, key):
                found[key] = (there or alternatives)[0]
        if any(key.startswith("pooling/") for key in found):  # all of it or nothing
            found |= {key: (inner + value,) for key, value in self.names.items() if key.startswith("pooling/")}
        if GATED in found and PLAIN in found:  # one of them
            del found[PLAIN if names.any(_pattern(found[GATED][0])) else GATED]
        return found

    def rules_of(
        self, names: Names, found: Mapping[str, tuple[str, ...]], depth: int
    ) -> tuple[list[Rule], dict[str, str]]:
        """The rules of all arrays, and the paths of biases that the file does not have, each with the reason."""
        table = []
        for key, starts in found.items():
            if not key.startswith("block/"):
                table += self._layer(names, key, key, starts)
                continue
            for index in range(depth):
                path = key.replace("block/", f"encoder/block_{index}/", 1)
                table += self._layer(names, key, path, tuple(start.replace("{}", str(index)) for start in starts))
        table, zeros = rules.without_absent(table, names, self.biasless)
        if "head/logits/kernel" in found:
            zeros["head/logits/bias"] = "the file's layers have no such bias"
        return table, zeros

    def _layer(self, names: Names, key: str, path: str, starts: tuple[str, ...]) -> list[Rule]:
        """The rules of one layer or parameter."""
        name = starts[0]
        if key in PARAMETERS:
            return [Rule(starts, (path,), PARAMETERS[key])]
        if key in RELATIVE:
            both = f"{path}/offsets", f"{path}/class"
            return [Rule(starts, both, relative_table(_relative_grid(names, name)))]
        if path.rpartition("/")[2].startswith("norm"):
            return norm(name, path, kind=self.fields.get("norm", "layer"))
        if key == "pooling/qkv":  # of torch.nn.MultiheadAttention
            both = "pooling/query", "pooling/key_value"
            return [
                Rule((f"{name}{end}",), tuple(f"{one}/{ours}" for one in both), rules.QUERY_APART)
                for end, ours in (("weight", "kernel"), ("bias", "bias"))
            ]
        if key == "embedding/projection":
            flat = f"{name}weight" in names and names.axes(f"{name}weight") == 2
            return dense(name, path, rules.LINEAR if flat else rules.PATCH_CONVOLUTION)
        if len(starts) == 1:
            layer = dense(name, path, rules.LINEAR)
        else:
            fused = rules.fused_linear(len(starts)), rules.fused_vectors(len(starts))
            layer = dense("{}", path, *fused, starts)
        if key == QKV:
            there = [re.sub(r"\d+", r"\\d+", re.escape(one)) for one in layer[1].names]
            there = [names.any(f"{one}$") for one in there]
            if not any(there):
                return layer[:1]
            if there == [True, False, True]:
                queries, _, values = layer[1].names
                layer[1] = Rule((queries, values), layer[1].paths, rules.QUERY_VALUE_BIASES)
        return layer

    def _model(
        self,
        names: Names,
        found: Mapping[str, tuple[str, ...]],
        depth: int,
        classifies: bool,
        table: list[Rule],
        recorded: Recorded,
        choices: Choices,
    ) -> tuple[VisionTransformer, int]:
        width, channels, patch = _embedding(names, f"{found['embedding/projection'][0]}weight")
        first = found.get(GATED) or found[PLAIN]
        head = found.get("head/logits")
        fields = {
            "classes": None if head is None else names.shape(f"{head[0]}weight", 2)[0],
            "patch_size": patch,
            "width": width,
            "depth": depth,
            "heads": self.heads_of(width, recorded, choices),
            "mlp_width": names.shape(f"{first[0].format(0)}weight", 2)[0],
            "class_token": "class_token" in found,
            "registers": names.shape(found["registers"][0], 3)[1] if "registers" in found else 0,
            "mlp": "swiglu" if GATED in found else "gelu",
            "qkv_bias": any(rule.paths[0].endswith("qkv/bias") for rule in table),
            "layer_scale": 1.0 if "block/scale_attention/scale" in found else None,
            "final_norm": "encoder/norm" in found or "norm" in found,
            "norm_after_pooling": "norm" in found,
            **self.fields,
        }
        if any(key in found for key in RELATIVE):
            fields |= {"position": "relative_class", "position_at": "shared" if RELATIVE[1] in found else None}
        if "head/logits/kernel" in found:
            fields["classes"] = names.shape(found["head/logits/kernel"][0], 2)[1]
        if "head/pre_logits" in found:
            fields["pre_logits"] = names.shape(f"{found['head/pre_logits'][0]}weight", 2)[0]
        if "norm_input" not in found:
            fields.pop("input_norm", None)
        has = {"width": width, "depth": depth, "registers": fields["registers"]}
        check_config({key: (value, has[one]) for one, (key, value) in recorded.sizes.items()})
        if fields["mlp"] == "gelu":
            fields["gelu"] = self.decide("gelu", self.gelu, recorded, choices)
        elif recorded.values.get("gelu") not in (None, "silu"):
            raise UserError(
                f"config.json has an MLP with a gate and {recorded.values['gelu']!r}\n  allowed: a gate with 'silu'"
            )
        fields["layer_norm_epsilon"] = self.decide("layer_norm_epsilon", self.epsilon, recorded, choices)
        if "pooling/probe" in found:
            return VisionTransformer(**fields, pooling="map"), channels
        mean = classifies or not fields["class_token"] or fields["norm_after_pooling"] or not fields["final_norm"]
        convention = "mean" if mean else "token"
        wanted = choices.overrides.get("pooling", convention)
        if fields["classes"] is not None and wanted not in (convention, "none"):
            raise UserError(
                f"pooling is {wanted!r}, but the file's head reads {convention!r}\n  omit pooling, or give 'none'"
            )
        fields["pooling"] = self.decide("pooling", convention, recorded, choices)
        return VisionTransformer(**fields), channels

    def heads_of(self, width: int, recorded: Recorded, choices: Choices) -> int:
        """The number of attention heads: recorded, usual, or by `choices`."""
        known, by = recorded.values.get("heads"), recorded.by.get("heads", "config.json")
        if known is None and width in self.heads and "heads_otherwise" not in choices.overrides:
            known, by = self.heads[width], f"convention of {self.family}"
        return choices.heads(width, known, self.family, by)

    def decide(self, field: str, convention: Any, recorded: Recorded, choices: Choices) -> Any:
        """As `Choices.decide`, but an override that contradicts what is recorded is an error."""
        value, by = recorded.values.get(field), recorded.by.get(field, "config.json")
        is_open = value is None or by.startswith("convention")
        if not is_open and choices.overrides.get(field, value) != value:
            raise UserError(
                f"{field} is {choices.overrides[field]!r}, but it is {value!r} by {by}\n"
                f"  omit {field}, or correct the JSON file"
            )
        return choices.decide(field, convention, value, by, self.family)


def depth_of(names: Names, found: Mapping[str, tuple[str, ...]]) -> int:
    """The number of blocks."""
    return names.count(_pattern(found[QKV][0].partition("{}")[0]) + r"(\d+)\.")


# Forms of parameters that are not of a dense layer or a norm.
PARAMETERS = {
    "class_token": rules.VECTOR,
    "registers": rules.SAME,
    "positions/table": rules.ROWS,
    "token_embedding": rules.SAME,
    "token_positions": rules.ROWS,
    "pooling/probe": rules.SAME,
    "block/scale_attention/scale": rules.SAME,
    "block/scale_mlp/scale": rules.SAME,
    "head/logits/kernel": rules.SAME,
}


def _pattern(start: str, separator: str = "\0") -> str:
    """A pattern for the start of names, with any number for '{}'."""
    return "|".join(re.escape(one).replace(r"\{\}", r"\d+") for one in start.split(separator))


def _relative_grid(names: Names, name: str) -> tuple[int, int]:
    """The grid of a table of relative positions, which is square.

    Raises:
        UserError: it is missing, or is not that of a square grid.
    """
    rows, _ = names.shape(name, 2)
    grid = relative_grid(rows, None)
    if grid is None:
        raise UserError(f"{name} has {rows} rows\n  allowed: those of a square grid with a class token, (2n - 1)^2 + 3")
    return grid


def _embedding(names: Names, name: str) -> tuple[int, int, int]:
    """Width, channels and patch size by the kernel of the patch embedding."""
    if name in names and names.axes(name) == 2:  # for patches that are flattened, of three channels
        width, pixels = names.shape(name, 2)
        patch = math.isqrt(pixels // 3)
        if 3 * patch * patch != pixels:
            raise UserError(
                f"{name} is for patches of {pixels} values\n  allowed: three channels of a square number of pixels"
            )
        return width, 3, patch
    width, channels, patch, across = names.shape(name, 4)
    if patch != across:
        raise UserError(f"{name} has patches of {patch}x{across}\n  allowed: square patches")
    return width, channels, patch
