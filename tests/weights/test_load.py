import re

import jax
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.models.stacking import stack_blocks
from vit_jax.weights import files
from vit_jax.weights.save import flattened


@pytest.fixture(scope="module")
def plain(tmp_path_factory, helpers):
    """A small file, its model and its parameters."""
    model, parameters = helpers.small(pre_logits=6)
    path = tmp_path_factory.mktemp("plain") / "file.npz"
    weights.save(path, model, parameters)
    return path, model, parameters


def test_classes_that_agree_keep_the_head_and_others_get_a_new_one(plain):
    path, model, _ = plain
    assert weights.load(path, classes=5)[0] == model
    found, new, report = weights.load(path, classes=7)
    # The whole head goes (arXiv 2010.11929, section 3.2): one zero layer instead of two.
    assert found == model.clone(classes=7, pre_logits=None)
    assert list(new["head"]) == ["logits"]
    assert not new["head"]["logits"]["kernel"].any() and new["head"]["logits"]["kernel"].shape == (24, 7)
    why = {row.names[0]: row.detail for row in report.rows if row.action == "ignored"}
    assert sorted(why) == ["head/bias", "head/kernel", "pre_logits/bias", "pre_logits/kernel"]
    assert why["head/kernel"] == "the file's head has 5 classes, the model's 7"
    found, new, _ = weights.load(path, classes=None)
    assert found.classes is None and "head" not in new
    found, new, _ = weights.load(path, classes={"a": 5, "b": 2})
    assert sorted(new["head"]) == ["a", "b"] and new["head"]["b"]["logits"]["bias"].shape == (2,)


def test_scanned_blocks_are_the_same_stacked(plain, helpers):
    path, model, parameters = plain
    found, stacked, report = weights.load(path, scan=True)
    assert found == model.clone(scan=True)
    expected = jax.tree.map(np.asarray, stack_blocks(parameters))
    jax.tree.map(np.testing.assert_array_equal, stacked, expected)
    paths = ["/".join(key.key for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(stacked)]
    helpers.covers(report, np.load(path).files, paths)


@pytest.mark.slow
def test_parameters_are_what_jax_takes_as_they_are(plain):
    path, _, _ = plain
    model, parameters, _ = weights.load(path, dtype="bfloat16")
    assert model.dtype == jax.numpy.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(parameters)} == {"float32"}
    images = jax.numpy.ones((1, 32, 32, 3))
    near = jax.jit(model.apply)({"params": parameters}, images)
    np.testing.assert_allclose(model.apply({"params": parameters}, images), near, atol=0.05)


WRONG = [
    ({"clases": 3}, "clases is not an override; nearest: classes"),
    ({"classes": 0}, r"classes is 0\n  allowed: an integer of at least 1"),
    ({"classes": "ten"}, r"classes is 'ten'\n  allowed: an integer"),
    ({"image_size": (1, 2, 3)}, r"image_size is \(1, 2, 3\)\n  allowed: an integer"),
    ({"patch_size": 0}, "patch_size is 0\n  allowed: an integer of at least 1"),
    ({"channels": 2.0}, "channels is 2.0"),
    ({"dtype": "float31"}, "dtype is 'float31'\n  allowed: a floating-point dtype"),
    ({"heads": 4}, "heads is 4, but the file has 3"),
    ({"pooling": "map"}, "pooling is 'map', which has parameters of its own"),
    ({"pooling": "max"}, "pooling is 'max': one of token, mean"),
    ({"step": 3}, "step is 3, but .* is a file"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_wrong_overrides_are_refused(plain, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        weights.load(plain[0], **overrides)
    assert str(caught.value).count("\n") <= 2


KINDS = (
    *("timm_swiglu", "hf_mae", "timm_vit", "timm_map", "hf_deit", "hf_dinov2_registers", "timm_dinov3_qkvb"),
    *("timm_eva02", "timm_beit", "timm_clip", "timm_aimv2", "clip", "siglip", "dinov3", "openai", "torchvision"),
)


@pytest.mark.parametrize("kind", mostly_slow(KINDS, 5))
def test_a_renamed_array_is_an_error_that_names_it(references, tmp_path, kind):
    """Each name in turn, a letter added; of the blocks, those of the last."""
    arrays = dict(files.open_file(references / kind).arrays)
    for name in arrays:
        if re.search(
            r"^(?!vis)(text|transformer|token|posit|ln_final|context|vocab|input_res|logit)|head|classifier|pooler|projection\.|visual\.proj|[sr]\.0\.|layer_0\.",
            name,
        ):
            continue
        changed = {f"{key}x" if key == name else key: array for key, array in arrays.items()}
        files.write_safetensors(tmp_path / "model.safetensors", changed)
        with pytest.raises(UserError) as caught:
            weights.load(tmp_path, heads=3, classes=None)
        assert name.removeprefix("visual.") in str(caught.value), (name, str(caught.value))
        assert str(caught.value).count("\n") <= 2


def test_a_renamed_array_of_googles_is_an_error_that_names_it(plain, tmp_path):
    arrays = dict(np.load(plain[0]))
    for name in arrays:
        np.savez(tmp_path / "file.npz", **{f"{key}x" if key == name else key: array for key, array in arrays.items()})
        with pytest.raises(UserError) as caught:
            weights.load(tmp_path / "file.npz")
        assert name.removeprefix("visual.") in str(caught.value), (name, str(caught.value))
        assert str(caught.value).count("\n") <= 2


def test_a_missing_a_left_over_and_a_misshapen_array(plain, tmp_path):
    arrays = dict(np.load(plain[0]))
    block = "Transformer/encoderblock_1/MlpBlock_3/Dense_0"
    cases = {
        f"missing: {block}/bias": {key: array for key, array in arrays.items() if key != f"{block}/bias"},
        "unexpected: surplus/kernel": arrays | {"surplus/kernel": np.ones(3, "f")},
        rf"{block}/kernel: encoder/block_1/mlp/up/kernel would have shape \[24, 39\], but .* has \[24, 40\]": arrays
        | {f"{block}/kernel": arrays[f"{block}/kernel"][:, 1:]},
        "cls.* NaN or infinite": arrays | {"cls": np.full_like(arrays["cls"], np.nan)},
    }
    for message, changed in cases.items():
        np.savez(tmp_path / "file.npz", **changed)
        with pytest.raises(UserError, match=message):
            weights.load(tmp_path / "file.npz")


def test_arrays_of_nothing_known_are_refused(tmp_path):
    np.savez(tmp_path / "file.npz", weight=np.ones(3, "f"))
    with pytest.raises(UserError, match="not a known Vision Transformer, by the names of its arrays: weight"):
        weights.load(tmp_path / "file.npz")


def test_into_a_given_model(plain, helpers):
    path, model, parameters = plain
    loaded, report = weights.load_into(path, model, 32, 3)
    helpers.same(loaded, parameters)
    target = model.clone(classes={"own": 4, "other": 5}, scan=True, dropout=0.1, gelu="exact", patch_size=8)
    loaded, report = weights.load_into(path, target, (64, 32), 1)
    shapes = jax.eval_shape(target.init, jax.random.key(0), np.ones((1, 64, 32, 1), "f"))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, loaded)
    assert not loaded["head"]["own"]["logits"]["kernel"].any()
    assert loaded["head"]["own"]["pre_logits"]["kernel"].std() == pytest.approx(24**-0.5, rel=0.3)
    assert "the file's model has gelu 'tanh', this one 'exact'" in report.notes


def test_into_a_model_without_pre_logits_goes_a_new_head(plain):
    path, model, _ = plain
    loaded, report = weights.load_into(path, model.clone(pre_logits=None), 32, 3)
    assert list(loaded["head"]) == ["logits"] and not loaded["head"]["logits"]["kernel"].any()
    assert "the file has pre_logits 6, the model None" in {row.detail for row in report.rows}


def test_a_new_head_is_zero_though_the_old_one_would_agree(plain, helpers):
    path, model, parameters = plain
    target = model.clone(pre_logits=None)
    loaded, report = weights.load_into(path, target, 32, 3, new_head=True)
    assert list(loaded["head"]) == ["logits"]
    assert not loaded["head"]["logits"]["kernel"].any() and not loaded["head"]["logits"]["bias"].any()
    helpers.same({**loaded, "head": {}}, {**parameters, "head": {}})
    why = {row.names[0]: row.detail for row in report.rows if row.action == "ignored"}
    assert why == dict.fromkeys(
        ("head/bias", "head/kernel", "pre_logits/bias", "pre_logits/kernel"), "a new head was requested"
    )
    made = {row.paths[0]: row.detail for row in report.rows if row.action == "initialized"}
    assert made == dict.fromkeys(("head/logits/bias", "head/logits/kernel"), "zero: a new head was requested")


def test_a_file_is_recognised_without_being_loaded(plain, references):
    assert weights.recognise(plain[0]).model == plain[1]
    assert weights.recognise(plain[0]).normalization == "half"
    assert weights.recognise(references / "timm_registers", heads=3).model.registers > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 48, "heads": 6, "depth": 3}, r"heads 3, not 6, width 24, not 48, depth 2, not 3"),
        ({"registers": 1}, "registers 0, not 1"),
        ({"layer_scale": 0.1}, "layer_scale None, not 0.1"),
        ({"pooling": "map"}, "pooling 'token', not 'map'"),
        ({"class_token": False, "pooling": "mean"}, "class_token True, not False"),
        ({"position": "rotary"}, "position 'learned', not 'rotary', position_at 'input', not 'layers'"),
    ],
)
def test_another_architecture_is_refused_with_what_differs(plain, fields, message):
    path, model, _ = plain
    with pytest.raises(UserError, match=f"its model differs from the one to load into: it has .*{message}"):
        weights.load_into(path, model.clone(**fields), 32, 3)


def test_heads_that_the_file_does_not_tell_are_the_models(references):
    model, _, _ = weights.load(references / "timm_distilled", heads=3, classes=None)
    weights.load_into(references / "timm_distilled", model, 12, 3)


def test_the_report_is_short_unless_asked(plain):
    path, _, parameters = plain
    _, _, report = weights.load(path, classes=7, image_size=64)
    short, long = report.table().splitlines(), report.table(verbose=True).splitlines()
    assert len(short) < 20 < len(long)
    assert "  resampled    Transformer/posembed_input/pos_embedding -> positions/table  (grid 8x8 -> 16x16)" in short
    assert all(any(name in line for line in long) for name in flattened(parameters) if "pre_logits" not in name)
    assert report.counts()["ignored"] == 4
