"""Overrides on the command line mean what they say, whatever the config file sets: sizes, lengths, warm-up."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import PIL.Image
import pytest
from helpers import ROOT, THOROUGH, flags, read_metrics, run_command, tiny_config
from ml_collections import ConfigDict
from test_config import ARGUMENTS

from vit_jax import commands, main, optim
from vit_jax import config as options
from vit_jax.config.overrides import RESETS
from vit_jax.data import splits
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import build_model

SPECS = [
    f"configs/{name}.py" + (f":{argument}" if argument else "") for name in ARGUMENTS for argument in ARGUMENTS[name]
]
PATCHES = (1, 2, 4, 8, 14, 16, 32)
# arXiv 2010.11929, table 1, and arXiv 2106.10270, table 1: width, layers, heads, MLP.
PAPER = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


@pytest.fixture(autouse=True, scope="module")
def directory(tmp_path_factory):
    """The current directory, with the photos of `made`."""
    root = tmp_path_factory.mktemp("overrides")
    for name in ("cat", "dog"):
        (root / "photos" / name).mkdir(parents=True)
        for index in range(2):
            PIL.Image.new("RGB", (96, 96), (80 * index, 40, 40)).save(root / "photos" / name / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


def image_side(config) -> int:
    """The side of the images of a shipped config, in pixels."""
    return config.data.image_size or {"digits": 8, "cifar10": 32, "cifar100": 32, "folder": 224}[config.data.name]


def made(spec: str, *overrides: str):
    """What a command makes of a shipped config and overrides, as if there were a file of weights to fine-tune."""
    weights = ["checkpoint.init_from=weights.npz", "data.normalization=half"] if "finetune" in spec else []
    photos = ["data.dir=photos"] if "photos" in spec else []
    return commands.make_config(spec, [*weights, *photos, *overrides])


def dense(inputs: int, outputs: int, bias: bool = True) -> int:
    """The number of parameters of a dense layer."""
    return inputs * outputs + bias * outputs


def closed_form(name: str, patch: int, side: int, channels: int, classes: int, section) -> int:
    """The number of parameters of a plain ViT with the other options of a config's model section."""
    width, depth, _, mlp = PAPER[name]
    has_token = section.pooling == "token"
    tokens = (side // patch) ** 2 + has_token
    block = 3 * dense(width, width, section.qkv_bias) + dense(width, width)
    block += dense(width, mlp) + dense(mlp, width) + 2 * 2 * width
    head = bool(section.pre_logits) * dense(width, width) + dense(width, classes)
    positions = tokens * width if section.position == "learned" else 0
    return dense(patch**2 * channels, width) + has_token * width + positions + depth * block + 2 * width + head


@functools.cache
def count(model: VisionTransformer, side: int, channels: int) -> int:
    """The number of parameters of a model."""
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def check_variant(spec: str, variant: str, file: ConfigDict) -> None:
    """A shipped config with an override of the variant: the model is that variant, with the file's other options."""
    config = made(spec, f"model.variant={variant}")
    assert config.model.variant == variant
    model = build_model.build(config.model, classes=7, dtype="float32")
    own = {"variant", "width", "depth", "heads", "mlp_width", "class_token", "pre_logits", "dtype", "attention_kernel"}
    others = {key: value for key, value in file.model.to_dict().items() if key not in own and value is not None}
    sized = variants.fields(variant)
    expected = VisionTransformer(
        classes=7,
        class_token=file.model.pooling == "token",
        pre_logits=sized["width"] if file.model.pre_logits else None,
        dtype="float32",
        **sized,
        **others,
    )
    assert model == expected
    size, _, patch = variant.partition("/")
    side, channels = image_side(file), 1 if file.data.name == "digits" else 3
    is_counted = size == "Ti" or (size in PAPER and int(patch) == min(side // 2, 16))
    if is_counted:
        # Scanned, so that one block is traced; without what has no parameters, so that recipes share the result.
        model = model.clone(scan=True, dropout=0.0, stochastic_depth=0.0)
        assert count(model, side, channels) == closed_form(size, int(patch), side, channels, 7, file.model)


def fitting(config: ConfigDict) -> list[str]:
    """The variants that a shipped config can have: patch sizes that divide its images; hybrids where there is room."""
    side = image_side(config)
    plain = [f"{size}/{patch}" for size, patch in itertools.product(PAPER, PATCHES) if side % patch == 0]
    masked = config.train.objective != "classify"  # needs patches that do not overlap
    return plain + [name for name in variants.HYBRIDS if side % 32 == 0 and not masked]


@pytest.mark.parametrize("spec", SPECS[::8])
def test_a_variant_on_the_command_line_is_that_variant(spec):
    known = fitting(file := options.load(spec))
    check_variant(spec, known[SPECS.index(spec) * 3 % len(known)], file)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_every_variant_on_the_command_line_is_that_variant(spec):
    """Of the variants every eighth, others for the next config; all with VIT_JAX_TEST_THOROUGH."""
    first, step = (0, 1) if THOROUGH else (SPECS.index(spec) % 8, 8)
    for variant in fitting(file := options.load(spec))[first::step]:
        check_variant(spec, variant, file)


def test_sizes_of_the_command_line_stay_in_any_order():
    flags = ["model.variant=B/4", "model.depth=2", "model.heads=6"]
    for order in itertools.permutations(flags):
        section = made("configs/cifar10.py:cpu", *order).model
        sizes = (section.width, section.depth, section.heads, section.mlp_width)
        assert sizes == (None, 2, 6, None)
    section = made("configs/cifar10.py:cpu", "model.depth=2").model
    assert (section.width, section.depth, section.heads, section.mlp_width) == (128, 2, 2, 256)


def test_overrides_reset_only_what_the_file_sets_against_them():
    for name, others in RESETS.items():
        for other in (name, *others):
            section, _, key = other.partition(".")
            assert key in options.OPTIONS[section] and (other == name or options.OPTIONS[section][key].default is None)
    config, plain = made("configs/cifar10.py:cpu", "model.variant=B/4"), made("configs/cifar10.py:cpu")
    changed = options.differences(plain.to_dict(), config.to_dict())
    assert [row.partition(":")[0] for row in changed] == [
        *("model.depth", "model.heads", "model.mlp_width", "model.variant", "model.width")
    ]


def test_a_size_that_another_option_of_the_file_gives_is_reset_too(tmp_path):
    lines = ["c = config.default()", "c.train.steps = 3", "c.model.depth = 2"]
    lines += ["c.model.width = c.model.get_ref('depth') * 48", "return c"]
    (tmp_path / "c.py").write_text("from vit_jax import config\ndef get_config():\n    " + "\n    ".join(lines))
    section = commands.make_config(f"{tmp_path}/c.py", ["model.variant=S/2"]).model
    assert (section.variant, section.width, section.depth) == ("S/2", None, None)


def test_the_help_on_a_config_shows_what_would_be_trained(capsys):
    overrides = ["--config.model.variant=S/4", "--config.train.steps=7", "--config.augment.mixup=0", "--help"]
    assert main.main(["--config=configs/cifar10.py", *overrides, "--config.augment.cutmix=0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in ("* variant = S/4 ", "  depth = None ", "  heads = None ", "* steps = 7 ", "  epochs = None "):
        assert any(line.startswith(start) for line in lines), start
    assert not any("mix_probability" in line for line in lines)


@pytest.mark.parametrize(
    "spec, overrides, expected",
    [
        ("configs/digits.py", ["train.steps=100"], (100, None)),
        ("configs/cifar10.py:cpu", ["train.epochs=5"], (None, 5.0)),
        ("configs/digits.py", ["train.epochs=None", "train.steps=100"], (100, None)),
        ("configs/digits.py", ["train.steps=100", "train.epochs=None"], (100, None)),
        ("configs/digits.py", ["train.steps=None"], (None, 200.0)),
        ("configs/cifar10.py:cpu", ["train.epochs=0"], (2000, 0.0)),
        ("configs/digits.py", [], (None, 200.0)),
    ],
)
def test_the_length_on_the_command_line_wins(spec, overrides, expected):
    train = commands.make_config(spec, overrides).train
    assert (train.steps, train.epochs) == expected


def test_two_lengths_on_the_command_line_are_refused():
    with pytest.raises(UserError, match=r"steps is 100 and config.train.epochs is 5.0\n  allowed: exactly one"):
        commands.make_config("configs/digits.py", ["train.steps=100", "train.epochs=5"])


@pytest.mark.parametrize(
    "spec, overrides, note",
    [
        (
            "configs/cifar10.py:cpu",
            ["optimizer.name=sgd"],
            "note: the config file sets optimizer.learning_rate=0.002 and optimizer.weight_decay=0.05 for "
            "optimizer.name='adamw'\n",
        ),
        ("configs/cifar10.py:cpu", ["optimizer.name=sgd", "optimizer.learning_rate=1", "optimizer.weight_decay=0"], ""),
        ("configs/cifar10.py:cpu", ["optimizer.name=adamw"], ""),
        (
            "configs/pretrain.py:imagenet21k",
            ["data.name=imagenet2012", "data.train=train"],
            "note: the config file sets data.test='train[:50000]' for data.name='folder'\n",
        ),
        ("configs/cifar10.py", ["data.name=cifar100"], ""),
    ],
)
def test_what_the_file_sets_for_another_optimizer_or_dataset_is_named(spec, overrides, note, capsys):
    commands.make_config(spec, overrides)
    assert capsys.readouterr().out == note


def test_the_width_of_the_layer_before_the_head_is_a_number_in_a_run():
    """So that runs of earlier versions, whose configs have numbers there, can be resumed."""
    for variant, width in (("B/16", 768), ("L/16", 1024), ("Ti/16", 192)):
        assert made("configs/pretrain.py:imagenet", f"model.variant={variant}").model.pre_logits == width
    assert made("configs/pretrain.py:imagenet", "model.pre_logits=None").model.pre_logits is None
    assert made("configs/pretrain.py:imagenet", "model.pre_logits=5", "model.width=96").model.pre_logits == 5
    assert made("configs/pretrain.py:imagenet", "model.width=96").model.pre_logits == 96
    unresolved = options.load("configs/pretrain.py:imagenet").model  # as a program in Python may pass it on
    assert unresolved.pre_logits == "width"
    assert build_model.build(unresolved, classes=2, dtype="float32").pre_logits == 768


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup, steps, used", [(200, 100, 10), (200, 200, 20), (200, 201, 200), (5, 5, 0), (0, 1, 0)])
def test_a_run_as_short_as_its_warm_up_uses_a_tenth(name, warmup, steps, used):
    config = tiny_config(optimizer={"schedule": name, "learning_rate": 0.5, "warmup_steps": warmup})
    rate = optim.schedule(config.optimizer, steps)
    for step in range(0, steps, 7):
        part = (step - used) / (steps - used)
        decayed = {"cosine": 0.25 * (1 + math.cos(math.pi * part)), "linear": 0.5 * (1 - part), "constant": 0.5}[name]
        expected = 0.5 * step / used if step < used else decayed
        assert float(rate(step)) == pytest.approx(expected, abs=1e-6), step


def test_a_shortened_warm_up_is_reported():
    section = tiny_config(optimizer={"warmup_steps": 200}).optimizer
    expected = "warning: optimizer.warmup_steps is 200, but the run has 100 steps: warm-up of 10 steps"
    assert optim.warmup_warning(section, 100) == expected
    assert optim.warmup_warning(section, 399).endswith("and the run has 399 steps: most of it is warm-up")
    assert optim.warmup_warning(section, 400) is None
    section.warmup_steps = 0
    assert optim.warmup_warning(section, 1) is None


@pytest.mark.parametrize(
    "one, other",
    [
        ("train", "train[98%:]"),
        ("train[:98%]", "train[98%:]"),
        ("train[10:20]+train[5:12]", "test+train[:11]"),
        ("train+train[:1]", "train[:1]+train[:2]"),
        ("train", "test"),
    ],
)
def test_the_examples_of_two_splits_are_counted(one, other):
    sizes = {"train": 200, "test": 50}
    selected = [
        {(piece.split, index) for piece in splits.parse(text, sizes) for index in range(piece.start, piece.stop)}
        for text in (one, other)
    ]
    assert splits.overlap(*(splits.parse(text, sizes) for text in (one, other))) == len(selected[0] & selected[1])


@pytest.mark.slow
def test_a_run_reports_its_variant_its_warm_up_and_splits_that_overlap(tmp_path):
    """And resumed with more steps, its learning rate is that of the config's warm-up."""
    small = flags(model={"variant": "Ti/4", "width": 16, "depth": 1, "heads": 2, "mlp_width": 16}, log={"every": 1})
    small += ["--config=configs/digits.py", f"--workdir={tmp_path}", "--config.mesh.devices=1"]
    overlapping = flags(data={"validation": "train[90%:]"})
    output = run_command("vit_jax.main", *small, *flags(train={"steps": 20}), *overlapping, cwd=ROOT)
    assert "\nmodel: Ti/4 (" in output
    assert output.count("warning: optimizer.warmup_steps is 200, but the run has 20 steps: warm-up of 2 steps") == 1
    assert "of the 144 validation examples are also trained on" in output
    rates = [line["train/learning_rate"] for line in read_metrics(tmp_path)]
    assert rates[1] == pytest.approx(2e-3 * 1 / 2) and rates[2] == pytest.approx(2e-3)
    output = run_command("vit_jax.main", *small, *flags(train={"steps": 250}), *overlapping, cwd=ROOT)
    assert "warm-up of" not in output and "the run has 250 steps: most of it is warm-up" in output
    rates = [line["train/learning_rate"] for line in read_metrics(tmp_path)]
    assert rates[20] == pytest.approx(2e-3 * 20 / 200) and max(rates[20:]) == pytest.approx(2e-3)
