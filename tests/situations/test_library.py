"""Arguments from Python as users have them: types of NumPy, JAX, Pillow and the file system; wrong ones are named."""

import io
import os
import pathlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import PIL.Image
import pytest

from vit_jax import weights
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.data import feature_store, sources, splits
from vit_jax.errors import UserError
from vit_jax.evaluation import extraction, fewshot, knn, linear_probe
from vit_jax.inference import Predictor, Unreadable, of_file
from vit_jax.models import attention_backends, masking, variants
from vit_jax.models.patches import patchify
from vit_jax.models.vit import VisionTransformer

SMALL = {"classes": 3, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "mlp_width": 16}
GREY = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
FEATURES = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
LABELS = np.arange(12) % 3
KEEP = np.arange(5) != 3  # of the tokens of `SMALL` on images of 8x8 pixels


@pytest.fixture(autouse=True)
def without_type_checker():
    """Annotations are not checked, as outside of the tests: a wrong type must be refused by the code itself."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="module")
def small():
    """A model, its parameters, and images."""
    model, generator = VisionTransformer(**SMALL), np.random.default_rng(1)
    images = jnp.asarray(generator.normal(size=(2, 8, 8, 3)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return model, jax.tree.map(lambda leaf: generator.normal(0, 0.4, leaf.shape).astype(np.float32), shapes), images


@pytest.fixture(scope="module")
def stored(small, tmp_path_factory):
    """The same model as a file of Google's names."""
    path = tmp_path_factory.mktemp("stored") / "model.npz"
    weights.save(path, *small[:2])
    return path


@pytest.fixture(scope="module")
def predictor(digits_run):
    return Predictor(os.fsencode(digits_run), batch_size=np.int64(2))


# --- masks ----------------------------------------------------------------------------------------------------------

ADDITIVE = np.where(KEEP, 0, -np.inf).astype(np.float32)[None, None, None]
WRONG_MASKS = {
    "additive": ADDITIVE,
    "additive in bfloat16": jnp.asarray(ADDITIVE, jnp.bfloat16),
    "0 and 1 as integers": KEEP.astype(np.int32)[None, None, None],
    "0 and 1 as floats": KEEP.astype(np.float32)[None, None, None],
    "per token": np.array([KEEP, KEEP]),
    "one axis": KEEP,
    "wrong number of tokens": np.ones((1, 1, 1, 4), bool),
    "lengths as floats": np.array([3.0, 4.0]),
    "lengths of other examples": np.array([3, 4, 5]),
    "list": [True] * 5,
    "one boolean": True,
    "text": "causal",
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_a_mask_is_boolean_or_refused(small, name):
    model, parameters, images = small
    with pytest.raises((TypeError, ValueError), match=r"^mask (is|has)") as caught:
        model.apply({"params": parameters}, images, mask=WRONG_MASKS[name])
    assert "allowed: " in str(caught.value) and str(caught.value).count("\n") <= 2


@pytest.mark.slow
def test_the_ways_out_of_a_mask_give_the_boolean_one(small):
    model, parameters, images = small
    expected = model.apply({"params": parameters}, images, mask=KEEP[None, None, None])
    assert np.abs(expected - model.apply({"params": parameters}, images)).max() > 1e-3
    integers = KEEP.astype(int)[None, None, None]
    for mask in (ADDITIVE == 0, integers == 1, np.array([KEEP, KEEP])[:, None, None, :]):
        np.testing.assert_array_equal(model.apply({"params": parameters}, images, mask=mask), expected)


@pytest.mark.parametrize("name", ["plain", "cudnn", "pallas"])
def test_lengths_of_a_backend_are_integers_or_refused(name):
    arrays = [jnp.ones((2, 5, 2, 16))] * 3
    for lengths in (jnp.array([3.0, 4.0]), jnp.ones((2, 1, 1, 5), bool), jnp.array([True, False])):
        with pytest.raises((TypeError, ValueError), match=r"^lengths (is|has)"):
            attention_backends.BACKENDS[name].attend(*arrays, None, lengths)


def test_what_a_backend_does_not_support_is_refused_and_not_ignored():
    arrays, bias = [jnp.ones((2, 5, 2, 16))] * 3, jnp.zeros((1, 2, 5, 5))
    with pytest.raises(ValueError, match="lengths"):
        attention_backends.BACKENDS["heads_first"].attend(*arrays, None, jnp.array([3, 4]))
    with pytest.raises(ValueError, match="bias"):
        attention_backends.BACKENDS["pallas"].attend(*arrays, bias, None)


@pytest.mark.parametrize("hidden", [np.ones((2, 4)), np.eye(4, dtype=int)[:2], [[True] * 4] * 2])
def test_a_choice_of_patches_is_boolean_or_refused(hidden):
    with pytest.raises(TypeError, match=r"^hidden is"):
        masking.visible_indices(hidden, 2)


# --- numbers, paths, arrays: what is taken --------------------------------------------------------------------------


class OwnPath:
    """A path of another library."""

    def __init__(self, path):
        self.path = os.fspath(path)

    def __fspath__(self):
        return os.fsencode(self.path)


@pytest.mark.parametrize("form", [str, os.fsencode, pathlib.PurePosixPath, OwnPath, np.str_])
def test_a_path_of_any_type_is_taken(form, stored, small, digits_run, tmp_path):
    _, loaded, report = weights.load(form(stored))
    np.testing.assert_array_equal(loaded["class_token"], small[1]["class_token"])
    assert report.source == str(stored)
    weights.save(form(tmp_path / "copy.npz"), *small[:2])
    assert (tmp_path / "copy.npz").stat().st_size == stored.stat().st_size
    assert extraction.load(form(stored), image_size=np.int64(8)).image_size == (8, 8)
    assert CheckpointManager(form(digits_run), read_only=True).find(np.int64(0)) == 0
    assert sources.load("digits", "train[:10]", cache_dir=form(tmp_path)).image_shape == (8, 8, 1)


INTEGERS = (int, np.int64, np.uint8, np.int32, jnp.int32, np.array)


@pytest.mark.parametrize("number", INTEGERS)
def test_an_integer_of_any_type_is_taken(number, stored, small):
    model, _, report = weights.load(stored, classes=number(5), image_size=(number(16), number(8)), channels=number(1))
    assert (model.classes, report.image_size, report.channels) == (5, (16, 8), 1)
    assert type(model.classes) is int and hash(model) == hash(weights.load(stored, classes=5)[0])
    assert VisionTransformer(**{name: number(value) for name, value in SMALL.items()}) == small[0]
    assert VisionTransformer(**SMALL | {"classes": {"a": number(3)}}).classes == {"a": 3}
    _, report = weights.load_into(stored, small[0], number(8), number(3), seed=number(1))
    assert report.image_size == (8, 8)
    assert sources.load("digits", "test[:3]", image_size=number(4)).image_shape == (4, 4, 1)
    expected = fewshot.draw(LABELS, 3, 2, 1, 0)
    np.testing.assert_array_equal(fewshot.draw(LABELS, *map(number, (3, 2, 1, 0))), expected)


@pytest.mark.parametrize("form", [np.asarray, jnp.asarray, np.ndarray.tolist, np.float16, np.float64])
def test_features_of_any_type_are_taken(form):
    features, labels = form(FEATURES), LABELS if form in (np.float16, np.float64) else form(LABELS)
    similarities, indices = knn.nearest(features, features, np.int64(2))
    assert indices[:, 0].tolist() == list(range(12))
    assert knn.votes(similarities, LABELS[indices], 3).argmax(axis=1).tolist() == LABELS.tolist()
    exact = FEATURES.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    cosines = exact @ exact.T / np.outer(lengths, lengths)
    np.testing.assert_allclose(similarities[:, 1], np.sort(cosines, axis=1)[:, -2], atol=2e-3)
    fitted = fewshot.fit(features, labels, np.int32(3))
    assert fitted.predict(features).tolist() == fewshot.fit(FEATURES, LABELS, 3).predict(FEATURES).tolist()


@pytest.mark.slow
def test_a_probe_takes_features_and_masks_of_any_type():
    included = [True] * 9 + [False] * 3
    probe = linear_probe.Probe(jnp.asarray(FEATURES), jnp.asarray(LABELS), np.int64(3))
    fitted = probe.fit(np.float64(0.1), included=included)
    same = linear_probe.Probe(FEATURES, LABELS, 3).fit(0.1, included=np.array(included))
    np.testing.assert_array_equal(fitted.classifier.kernel, same.classifier.kernel)
    assert not np.allclose(fitted.classifier.kernel, probe.fit(0.1).classifier.kernel, atol=1e-4)
    assert probe.choose(np.array([0.1, 1.0]), np.int64(0), 0.3).l2 in (0.1, 1.0)


def encoded(format_="PNG"):
    buffer = io.BytesIO()
    PIL.Image.fromarray(GREY).save(buffer, format_)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "form",
    ["path", "bytes path", "own path", "array of paths", "contents", "view", "stream", "Pillow", "RGB", "opened file"]
    + ["jax", "3 axes"],
)
def test_an_image_of_any_type_is_taken(form, predictor, tmp_path):
    path = tmp_path / "digit.png"
    path.write_bytes(encoded())
    image = {
        "path": path,
        "bytes path": os.fsencode(path),
        "own path": OwnPath(path),
        "array of paths": np.array([str(path)]),
        "contents": encoded(),
        "view": memoryview(encoded()),
        "stream": io.BytesIO(encoded()),
        "Pillow": PIL.Image.fromarray(GREY),
        "RGB": PIL.Image.fromarray(GREY).convert("RGB"),
        "jax": jnp.asarray(GREY),
        "3 axes": GREY[..., None],
        "opened file": PIL.Image.open(path),
    }[form]
    (expected,) = predictor(GREY)
    again = {"array of paths": [str(path)], "stream": [io.BytesIO(encoded())]}.get(form, [image])
    for images in (image, again * (1 if form == "stream" else 2), tuple(again), iter(again)):
        if form == "stream":
            image.seek(0)
            again[0].seek(0)
        for found in predictor(images, top=np.int64(2)):
            np.testing.assert_array_equal(found.logits["label"], expected.logits["label"])
            assert found.guesses == expected.guesses[:2]
        assert found.image == (str(path) if "path" in form else len(images) - 1 if isinstance(images, list) else 0)
    if form != "stream":
        assert next(predictor.stream(again)).label == expected.label


def test_several_images_in_one_array_are_taken(predictor):
    several = jnp.asarray(np.stack([GREY, 255 - GREY])[..., None])
    assert [found.image for found in predictor(several)] == [0, 1]


@pytest.mark.parametrize("names", [["a", "b", "c"], np.array(["a", "b", "c"]), (name for name in "abc")])
def test_class_names_of_any_type_are_taken(names, stored):
    classifier = of_file(os.fsencode(stored), class_names=names, image_size=np.int64(8))
    assert classifier.inputs.classes == {"label": ("a", "b", "c")} and classifier.inputs.image_shape == (8, 8, 3)


# --- what is refused ------------------------------------------------------------------------------------------------

FLOATS = GREY / 255
BAD_IMAGES = {
    "floats": (FLOATS, "images[0] has pixels of dtype float64", "astype('uint8')"),
    "floats of JAX": ([GREY, jnp.asarray(FLOATS)], "images[1] has pixels of dtype float32", "astype('uint8')"),
    "booleans": (GREY > 9, "images[0] has pixels of dtype bool", "uint8"),
    "16 bits": (GREY.astype(np.uint16), "images[0] has pixels of dtype uint16", "uint8"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), "images[0] has shape [3, 8, 8]", "[height, width, channels]"),
    "one axis": (GREY[0], "images[0] has shape [8]", "[height, width]"),
    "no pixels": (GREY[:0], "images[0] has shape [0, 8]", "[height, width]"),
    "five axes": (np.zeros((1, 1, 8, 8, 1), np.uint8), "images[0] has shape", "[height, width]"),
    "lists of pixels": ([GREY.tolist()], "images[0] is [[", "np.asarray(image, np.uint8)"),
    "a number": (3, "images is 3", "a path"),
    "None": (None, "images is None", "a path"),
    "None among them": ([GREY, None], "images[1] is None", "a path"),
    "a file of text": (io.StringIO("x"), "images is a file that was opened for reading text", "'rb'"),
    "bytes of no image": (b"not an image", "0 cannot be read", "leave it out"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_one_is_named(name, predictor):
    images, what, way_out = BAD_IMAGES[name]
    with pytest.raises(UserError) as caught:
        predictor(images)
    assert str(caught.value).startswith(what) and way_out in str(caught.value)
    assert str(caught.value).count("\n") <= 2


def test_the_way_out_of_floats_is_the_same_image(predictor):
    image = FLOATS
    converted = (255 * image).round().astype("uint8")
    np.testing.assert_array_equal(converted, GREY)
    assert isinstance(next(predictor.stream([image])), Unreadable)


def calls(small, stored, predictor, run):
    """By id: a call with an argument of the wrong type, and the name of the argument."""
    model, parameters, images = small
    load, draw, nearest = weights.load, fewshot.draw, knn.nearest
    manager = CheckpointManager(run, read_only=True)
    probe = linear_probe.Probe(FEATURES, LABELS, 3)
    rows = [
        *(("image_size", load, (stored,), {"image_size": v}) for v in ("224", 8.0, (8,), (8, 8, 3), True, 0)),
        *(("classes", load, (stored,), {"classes": v}) for v in ("ten", 2.5, True, [3], 0, -1)),
        *(("classes", load, (stored,), {"classes": v}) for v in ({"a": 1.5}, {3: 3})),
        *(("channels", load, (stored,), {"channels": v}) for v in (None, 0, 3.0, np.float32(3), "3")),
        *(("scan", load, (stored,), {"scan": v}) for v in ("yes", 1, None)),
        *(("step", load, (run,), {"step": v}) for v in (1.5, "newest", True, np.array([1]))),
        *(("pooling", load, (stored,), {"pooling": v}) for v in (1, b"mean")),
        *(("layer_norm_epsilon", load, (stored,), {"layer_norm_epsilon": v}) for v in ("small", None, float("nan"))),
        *(("path_or_name", load, (v,), {}) for v in (None, 3, [stored], {"a": 1}, io.BytesIO())),
        *(("path", weights.save, (v, model, parameters), {}) for v in (None, 3, [stored])),
        ("model", weights.save, ("x.npz", parameters, model), {}),
        ("parameters", weights.save, ("x.npz", model, None), {}),
        *(("source", Predictor, (v,), {}) for v in (None, 3, model, [run])),
        *(("batch_size", Predictor, (run,), {"batch_size": v}) for v in (0, 1.5, "2", None, True)),
        *(("step", Predictor, (run,), {"step": v}) for v in (1.5, "newest", True)),
        *(("top", predictor, (GREY,), {"top": v}) for v in (0, -1, 1.5, "5", None, True)),
        *(("class_names", of_file, (stored,), {"class_names": v}) for v in ("abc", b"abc", 3, [1, 2, 3])),
        *(("image_size", of_file, (stored,), {"image_size": v}) for v in ("8", 8.0, (8, 8, 3), 0)),
        *(("pooling", extraction.load, (stored,), {"pooling": v}) for v in ("max", 3, ["mean"])),
        *(("step", manager.find, (v,), {}) for v in (1.5, "newest", True, [1])),
        *(("workdir", CheckpointManager, (v,), {}) for v in (None, 3)),
        *(("split", sources.load, ("digits", v), {}) for v in (None, 3, ["train"], b"train")),
        *(("labels", sources.load, ("digits", "train"), {"labels": v}) for v in ("label", 3, [3])),
        *(("decoded", sources.load, ("digits", "train"), {"decoded": v}) for v in ("no", 0, None)),
        *(("image_size", sources.load, ("digits", "train"), {"image_size": v}) for v in ("8", 8.5, (8, 8, 1), 0)),
        *(("cache_dir", sources.load, ("digits", "train"), {"cache_dir": v}) for v in (3, ["x"])),
        *(("path", feature_store.read, (v,), {}) for v in (None, 3)),
        *(("split", splits.parse, (v, {"train": 9}), {}) for v in (None, slice(3), 3)),
        *(("indices", sources.load("digits", "test").read, (v,), {}) for v in ([True, False], [0.5], [360], ["a"])),
        *(("bank", nearest, (v, FEATURES, 1), {}) for v in (FEATURES[0], FEATURES[None], [["a"]], None, [[1], [2, 3]])),
        *(("queries", nearest, (FEATURES, v, 1), {}) for v in (FEATURES[:, :0], "x", FEATURES[:, :3], FEATURES > 0)),
        *(("count", nearest, (FEATURES, FEATURES, v), {}) for v in (0, 13, 2.0, "2", None)),
        *(("labels", draw, (v, 3, 1, 0, 0), {}) for v in (LABELS / 1, np.eye(3)[LABELS], list("abc"), None)),
        *(("labels", draw, (v, 3, 1, 0, 0), {}) for v in (LABELS - 1, LABELS + 1, LABELS > 0, LABELS[:, None])),
        *(("shots", draw, (LABELS, 3, v, 0, 0), {}) for v in (0, 1.5, None)),
        *(("seed", draw, (LABELS, 3, 1, v, 0), {}) for v in (-1, 1.5, "0")),
        *(("labels", fewshot.fit, (FEATURES, v, 3), {}) for v in (LABELS[:5], LABELS + 0.5, np.eye(3)[LABELS])),
        *(("features", fewshot.fit, (v, LABELS, 3), {}) for v in (FEATURES[0], None, "x", FEATURES.astype(complex))),
        *(("included", probe.fit, (0.1,), {"included": v}) for v in (np.arange(5), np.ones(12), [True], LABELS)),
        *(("l2", probe.fit, (v,), {}) for v in ("x", -1, float("nan"), True)),
        *(
            ("features", fewshot.fit(FEATURES, LABELS, 3).predict, (v,), {})
            for v in (FEATURES[:, :2], FEATURES[0], "x")
        ),
        *(("width", VisionTransformer, (), SMALL | {"width": v}) for v in (16.0, "16", None, True, [16])),
        *(("classes", VisionTransformer, (), SMALL | {"classes": v}) for v in ("3", 3.0, [3], {"a": 2.5})),
        *(("class_token", VisionTransformer, (), SMALL | {"class_token": v}) for v in (1, "yes", None)),
        *(("dropout", VisionTransformer, (), SMALL | {"dropout": v}) for v in ("0.1", None, True, float("nan"))),
        *(("stem", VisionTransformer, (), SMALL | {"stem": v}) for v in (3, (3, 4.0), "34")),
        *(("dtype", VisionTransformer, (), SMALL | {"dtype": v}) for v in ("int32", "float31", None)),
        *(("attention_kernel", VisionTransformer, (), SMALL | {"attention_kernel": v}) for v in ("fast", None)),
        *(("inputs", model.apply, ({"params": parameters}, v), {}) for v in (images[0, 0], images[None])),
        *(("name", variants.fields, (v,), {}) for v in (None, 16, ["B/16"])),
        *(("images", patchify, (v, 4), {}) for v in (images[0], images[None])),
    ]
    return {f"{name} {number}": (name, *row) for number, (name, *row) in enumerate(rows)}


def test_a_value_of_the_wrong_type_is_refused_by_name(small, stored, predictor, digits_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = calls(small, stored, predictor, digits_run)
    wrong = {}
    for case, (name, function, arguments, keywords) in made.items():
        try:
            function(*arguments, **keywords)
        except (UserError, TypeError, ValueError) as error:
            assert "Type-check" not in str(error)
            first, *rest = str(error).split("\n")
            if name not in first or len(rest) > 2 or not (rest or "must" in first or "one of" in first or ":" in first):
                wrong[case] = f"{type(error).__name__}: {error}"
        else:
            wrong[case] = f"accepted: {arguments[1:]} {keywords}"
    assert not wrong, "\n".join(f"{case}: {text}" for case, text in wrong.items())
    assert len(made) > 150 and not list(tmp_path.iterdir())
