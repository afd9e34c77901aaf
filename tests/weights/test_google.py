import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.weights.save import flattened

FILES = [
    ("params_token.npz", "token"),
    ("params_token.prelinen.npz", "token"),
    ("params_hybrid.prelinen.npz", "hybrid"),
]


@pytest.mark.parametrize(("file", "kind"), FILES)
def test_published_numbers_and_every_array_accounted_for(goldens, helpers, file, kind):
    model, parameters, report = weights.load(goldens / file)
    logits = helpers.outputs(model, parameters, np.load(goldens / f"inputs_{kind}.npy"))
    np.testing.assert_allclose(logits, np.load(goldens / f"logits_{kind}.npy"), rtol=0, atol=1e-5)
    helpers.covers(report, np.load(goldens / file).files, flattened(parameters))
    assert (report.image_size, report.channels, model.heads) == ((32, 32), 3, 3)


@pytest.mark.parametrize("file", ["params_token.prelinen.npz", "params_hybrid.prelinen.npz"])
def test_published_files_come_back_bit_for_bit(goldens, tmp_path, file):
    model, parameters, _ = weights.load(goldens / file)
    weights.save(tmp_path / "back.npz", model, parameters)
    before, after = dict(np.load(goldens / file)), dict(np.load(tmp_path / "back.npz"))
    assert sorted(before) == sorted(after)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name, strict=True)


@pytest.mark.parametrize(("kind", "sides"), [("token", {"up": 12, "down": 5}), ("gap", {"up": 12})])
def test_tables_of_positions_are_resampled_as_published(goldens, google_file, helpers, kind, sides):
    tables = np.load(goldens / "posemb_resize.npz")
    fields = {} if kind == "token" else {"class_token": False, "pooling": "mean"}
    model, parameters = helpers.small(**fields)
    parameters["positions"]["table"] = tables[f"src_{kind}"]
    path = google_file(model, parameters)
    for name, side in sides.items():
        _, found, report = weights.load(path, image_size=4 * side)
        np.testing.assert_allclose(found["positions"]["table"], tables[f"{name}_{kind}"], rtol=0, atol=1e-6)
        row = next(row for row in report.rows if "positions/table" in row.paths)
        assert (row.action, row.detail) == ("resampled", f"grid 8x8 -> {side}x{side}")


LINEN = {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0", "MultiHeadDotProductAttention_1": "M_0"}


def linen(name):
    for old, new in LINEN.items():
        name = name.replace(old, new)
    return name.replace("M_0", "MultiHeadDotProductAttention_0")


def big_vision(name):
    return linen(name).replace("Transformer/posembed_input/pos_embedding", "pos_embedding")


KINDS = [
    {},
    {"classes": None},
    {"class_token": False, "pooling": "mean"},
    {"pre_logits": 7},
    {"class_token": False, "pooling": "map", "pre_logits": 16},
    {"pooling": "map", "heads": 4},
    {"stem": (), "stem_width": 32, "patch_size": 2},
    {"stem": (2, 1), "stem_width": 32, "patch_size": 1, "pre_logits": 8, "class_token": False, "pooling": "mean"},
]


@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.parametrize("names", mostly_slow(["published", "linen", "opt/target/", "params/"], 4))
def test_the_model_is_inferred_whatever_the_naming(google_file, helpers, fields, names):
    model, parameters = helpers.small(**fields)
    prefix = names if "/" in names else ""
    rename = (lambda name: name) if names == "published" else lambda name: prefix + linen(name)
    path = google_file(model, parameters, rename)
    found, same, report = weights.load(path)
    assert found == model
    helpers.same(same, parameters)
    helpers.covers(report, np.load(path).files, flattened(parameters))


def test_unpooled_tokens_are_for_the_user_to_say(google_file, helpers):
    for fields in ({"pooling": "none"}, {"pooling": "none", "class_token": False}):
        model, parameters = helpers.small(**fields)
        path = google_file(model, parameters)
        found, same, report = weights.load(path, pooling="none")
        assert found == model
        helpers.same(same, parameters)
        assert ("pooling", "none", "override") in {(one.field, one.value, one.source) for one in report.decisions}
        assert weights.load(path)[0].pooling == ("token" if model.class_token else "mean")


def scanned(arrays):
    """All blocks in one array, as big_vision's `scan` has them."""
    block = "params/img/Transformer/encoderblock_"
    rest = {name: array for name, array in arrays.items() if not name.startswith(block)}
    for name in [name for name in arrays if name.startswith(block + "0/")]:
        stacked = np.stack([arrays[name.replace(block + "0/", f"{block}{i}/")] for i in range(2)])
        rest[name.replace("encoderblock_0/", "encoderblock/")] = stacked
    return rest


@pytest.mark.parametrize("scan", [False, True])
def test_scanned_files_of_two_towers(google_file, helpers, scan):
    model, parameters = helpers.small(class_token=False, pooling="map")
    others = {"params/txt/embedding/kernel": np.zeros((2, 2), "f"), "params/t": np.zeros(1, "f")}
    path = google_file(
        model, parameters, lambda name: "params/img/" + big_vision(name), lambda arrays: scanned(arrays) | others
    )
    found, same, report = weights.load(path, scan=scan)
    assert found == model.clone(scan=scan)
    helpers.same(same, parameters)
    ignored = {row.names[0]: row.detail for row in report.rows if row.action == "ignored"}
    assert ignored == {
        "params/txt/embedding/kernel": "the text tower",
        "params/t": "a parameter of the contrastive loss",
    }
    layers = [f"encoder/block_{i}/mlp/up/bias" for i in range(2)]
    row = next(row for row in report.rows if row.names[0].endswith("MlpBlock_0/Dense_0/bias") and len(row.paths) < 3)
    if row.paths != ("pooling/mlp/up/bias",):
        assert row.paths == (("encoder/blocks/mlp/up/bias",) if scan else tuple(layers))


def test_big_visions_class_token_has_no_position(google_file, helpers):
    model, parameters = helpers.small()

    def without(arrays):
        return arrays | {"pos_embedding": arrays["pos_embedding"][:, 1:]}

    found, same, _ = weights.load(google_file(model, parameters, big_vision, without))
    assert found == model
    parameters["positions"]["table"][:, 0] = 0
    helpers.same(same, parameters)


def test_no_table_is_fixed_sines_and_cosines(google_file, helpers, tmp_path):
    model, parameters = helpers.small(class_token=False, pooling="mean")

    def without(arrays):
        return {name: array for name, array in arrays.items() if not name.endswith("pos_embedding")}

    path = google_file(model, parameters, big_vision, without)
    with pytest.raises(UserError, match="missing: Transformer/posembed_input/pos_embedding"):
        weights.load(path)
    found, _, report = weights.load(path, position="sincos_2d")
    path = google_file(model, parameters, lambda name: "params/" + big_vision(name), without)
    found, _, report = weights.load(path)
    assert found == model.clone(position="sincos_2d")
    assert report.image_size is None
    assert "position 'sincos_2d': convention of big_vision's files" in str(report)
    assert weights.load(tmp_path / "file.npz", position="none")[0].position == "none"
    target = model.clone(position="none")
    weights.load_into(tmp_path / "file.npz", target, 32, 3)
    with pytest.raises(UserError, match="the size of the position embedding 'learned' is unknown\n  pass image_size"):
        weights.load(tmp_path / "file.npz", position="learned")
    with pytest.raises(UserError, match="the file has no arrays for positions/table"):
        weights.load(tmp_path / "file.npz", position="learned", image_size=32)


def test_a_grid_that_is_not_square_has_to_be_given(google_file, helpers):
    model, parameters = helpers.small(image_size=(16, 32))
    path = google_file(model, parameters)
    with pytest.raises(UserError, match="32 patches, which do not form a square"):
        weights.load(path)
    _, same, report = weights.load(path, image_size=(16, 32))
    helpers.same(same, parameters)
    assert report.image_size == (16, 32)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"registers": 2}, "registers=2"),
        ({"mlp": "swiglu", "qk_norm": True}, "mlp='swiglu', qk_norm=True"),
        ({"qkv_bias": False, "layer_scale": 0.1}, "qkv_bias=False, layer_scale=0.1"),
        ({"position": "rotary", "heads": 6}, "position='rotary', position_at='layers'"),
        ({"position_at": "layers"}, "position_at='layers'"),
        ({"pooling": "mean", "norm_after_pooling": True}, "norm_after_pooling=True"),
        ({"parallel": True}, "parallel=True"),
        ({"classes": {"a": 2, "b": 3}}, "several heads"),
    ],
)
def test_unsupported_options_are_named(tmp_path, helpers, fields, named):
    model, parameters = helpers.small(**fields)
    with pytest.raises(UserError, match=f"does not support {named}"):
        weights.save(tmp_path / "no.npz", model, parameters)
    assert not (tmp_path / "no.npz").exists()


@pytest.mark.parametrize("kind", mostly_slow(["sincos_2d", "sinusoidal", "learned_2d"], 3))
@pytest.mark.parametrize("suffix", ["npz", pytest.param("safetensors", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_positions_that_are_a_table_in_the_end_are_written_as_one(tmp_path, helpers, kind, suffix):
    model, parameters = helpers.small((16, 32), position=kind, registers=2 if suffix == "safetensors" else 0)
    path = tmp_path / f"file.{suffix}"
    with pytest.raises(
        UserError, match=f"position '{kind}' is written as a table for one image size\n  pass image_size"
    ):
        weights.save(path, model, parameters)
    (note,) = weights.save(path, model, parameters, (16, 32))
    assert note == f"position '{kind}' is written as its table for images of 16x32"
    found, table, _ = weights.load(path, image_size=(16, 32))
    assert found == model.clone(position="learned")
    images = np.random.default_rng(4).normal(size=(2, 16, 32, 3)).astype("f")
    expected = helpers.outputs(model, parameters, images)
    np.testing.assert_allclose(helpers.outputs(found, table, images), expected, rtol=0, atol=1e-5)


def test_notes_say_what_the_file_cannot_express(tmp_path, helpers):
    model, parameters = helpers.small(gelu="exact", layer_norm_epsilon=1e-12)
    notes = weights.save(tmp_path / "file.npz", model, parameters)
    assert [note.split(":")[0] for note in notes] == [
        "the file cannot express gelu='exact'",
        "the file cannot express layer_norm_epsilon=1e-12",
    ]
    assert weights.load(tmp_path / "file.npz", gelu="exact", layer_norm_epsilon=1e-12)[0] == model
