"""`vit_jax.backbone`, and `vit-jax features --images`, which stores what it returns."""

import csv
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax import backbones, features, weights
from vit_jax.data import feature_store
from vit_jax.errors import UserError
from vit_jax.evaluation import tokens

REFERENCES = Path(__file__).resolve().parent / "weights" / "references"
FILE = REFERENCES / "hf_dinov2_registers"


@pytest.fixture(scope="module")
def pixels():
    """Five pictures of the size of the model."""
    return np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), np.uint8)


@pytest.fixture(scope="module")
def album(pixels, tmp_path_factory):
    """A directory with these pictures, one of them in a directory below, and what is no picture."""
    root = tmp_path_factory.mktemp("album")
    (root / "more").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(root / ("more" if index == 4 else "") / f"{index}.png")
    (root / "broken.png").write_bytes(b"nothing")
    (root / "notes.txt").write_text("nothing")
    return root


@pytest.fixture(scope="module")
def expected(pixels):
    """Tokens of both layers by kind, [layers, images, ...], of the images, normalized here by ImageNet's statistics."""
    model, parameters, _ = weights.load(FILE)
    assert (model.registers, model.depth) == (4, 2)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = jnp.asarray((pixels / 255 - mean) / std, jnp.float32)
    apply = jax.jit(lambda x: tokens.apply(model, parameters, x, (0, 1)))
    return jax.tree.map(np.asarray, apply(images)), images


def close(found, expected):
    assert set(found) == set(expected)
    for kind in expected:
        np.testing.assert_allclose(found[kind], expected[kind], rtol=0, atol=1e-5, err_msg=kind)


def test_pictures_and_normalized_images_have_the_same_tokens(pixels, expected, album):
    backbone, (both, images) = vit_jax.backbone(FILE, batch_size=2), expected
    assert backbone.image_size == (12, 12) and str(FILE) in repr(backbone)
    of_pictures = backbone(pixels)
    close(of_pictures, jax.tree.map(lambda array: array[1], both))
    assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in of_pictures.values())
    of_images = backbone(images, layers=[-2, -1], dense=False)
    close(of_images, {kind: array for kind, array in both.items() if kind != "patches"})
    assert backbone(Image.new("L", (50, 31)))["patches"].shape == (1, 3, 3, 12)


@pytest.mark.slow
def test_pictures_of_several_sizes_through_a_model_with_rotary_positions():
    file, sizes = REFERENCES / "timm_dinov3", ((40, 31), (31, 40), (64, 20))
    pictures = [np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    backbone, prepared = vit_jax.backbone(file, batch_size=2), backbones.classifier(file)
    found = backbone(pictures)
    assert found["patches"].shape == (3, 4, 4, 12)
    close(found, backbone(np.stack([prepared.pixels(picture) for picture in pictures])))


@pytest.mark.slow
def test_images_of_any_size_have_positions_that_are_resampled_as_weights_load_does(pixels):
    images = np.random.default_rng(1).normal(size=(2, 8, 20, 3)).astype(np.float32)
    model, parameters, _ = weights.load(FILE, image_size=(8, 20), pooling="none")
    expected = jax.jit(model.apply)({"params": parameters}, jnp.asarray(images))
    found = vit_jax.backbone(FILE)(images)
    np.testing.assert_allclose(found["patches"].reshape(2, 10, 12), expected[:, 5:], rtol=0, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: vit_jax.backbone(FILE)(x)["pooled"].sum()))(images)
    assert gradient.shape == images.shape and np.abs(gradient).max() > 0
    resized = vit_jax.backbone(FILE, image_size=(8, 20))
    assert resized.image_size == (8, 20) and resized(pixels)["patches"].shape == (5, 2, 5, 12)
    close(resized(images), found)


@pytest.mark.slow
def test_a_run_with_stacked_blocks_and_another_size(make_run):
    workdir = make_run(model={"depth": 2, "scan": True, "pooling": "mean"})
    images = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 1), np.uint8)
    found = vit_jax.backbone(workdir)(images)
    expected = vit_jax.load(workdir).features(images)
    np.testing.assert_allclose(found["pooled"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["patches"].mean((1, 2)), expected, rtol=0, atol=1e-5)
    large = vit_jax.backbone(workdir, image_size=16)(images, layers=[0, 1])
    assert large["patches"].shape == (2, 3, 4, 4, 16)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((12, 12, 3), np.float32), r"float32 with shape \[12, 12, 3\]\n"),
        (np.zeros((1, 12, 12, 1), np.float32), r"allowed: normalized images \[batch, height, width, 3\]"),
        (np.zeros((1, 12, 10, 3), np.float32), "images of 12x10: .*\n  use a size"),
    ],
)
def test_what_is_no_image_is_refused(images, words):
    with pytest.raises(UserError, match=words):
        vit_jax.backbone(FILE)(images)


def test_features_of_a_directory_are_stored_with_paths_and_what_cannot_be_read_is_named(
    album, expected, tmp_path, capsys
):
    out = tmp_path / "out.npz"
    assert features.main([f"--init={FILE}", f"--images={album}", "--layers=-1,0", "--dense", f"--out={out}"]) == 1
    printed = capsys.readouterr()
    assert "features of 5 images" in printed.out
    assert "broken.png: cannot be read as an image" in printed.err and "1 of 6 images could not be read" in printed.err
    stored, both = feature_store.read(out), expected[0]
    names = [*(f"{index}.png" for index in range(4)), "more/4.png"]
    assert list(stored.ids) == [str(album / name) for name in names] and stored.labels == {}
    np.testing.assert_allclose(stored.features, np.moveaxis(both["pooled"][::-1], 0, 1), rtol=0, atol=1e-5)
    with np.load(out) as arrays:
        np.testing.assert_allclose(arrays["patches"], np.moveaxis(both["patches"][::-1], 0, 1), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_nearest_images_are_those_of_the_largest_cosine(album, expected, tmp_path, capsys):
    vectors = expected[0]["pooled"][1]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    names = [str(album / name) for name in ("0.png", "1.png", "2.png", "3.png", "more/4.png")]
    table = tmp_path / "similar.csv"
    assert features.main([f"--init={FILE}", f"--images={album}", "--nearest=2", f"--csv={table}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(lines) == 5 and len(rows) == 10
    for own, name in enumerate(names):
        best = np.argsort(-cosines[own])[:2]
        found = [row for row in rows if row["path"] == name]
        assert [row["similar"] for row in found] == [names[index] for index in best]
        np.testing.assert_allclose([float(row["similarity"]) for row in found], cosines[own][best], atol=1e-5)
        shown = ", ".join(f"{names[index]} {cosines[own][index]:.3f}" for index in best)
        assert lines[own] == f"{name}  {shown}"


@pytest.mark.slow
def test_a_run_gives_features_of_images_too_and_copies_are_nearest(make_run, tmp_path, capsys):
    workdir, root = make_run(), tmp_path / "album"
    root.mkdir()
    for index in range(3):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (8, 8), np.uint8)).save(root / f"{index}.png")
    assert features.main([f"--workdir={workdir}", f"--images={root}"]) == 0
    stored = feature_store.read(workdir / "features" / "images" / "album.npz")
    pictures = [str(root / f"{index}.png") for index in range(3)]
    np.testing.assert_allclose(stored.features, vit_jax.load(workdir).features(pictures), rtol=0, atol=1e-5)
    for copy in ("a", "b", "c"):
        shutil.copy(root / "1.png", root / f"{copy}.png")
    capsys.readouterr()
    assert features.main([f"--workdir={workdir}", f"--images={root}", "--nearest=1", f"--out={tmp_path / 'dir'}"]) == 0
    pairs = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith(str(root))]
    copies = {str(root / name) for name in ("1.png", "a.png", "b.png", "c.png")}
    assert len(pairs) == 6 and all(own != other for own, other in pairs)
    assert all(other in copies for own, other in pairs if own in copies)
    assert len(feature_store.read(tmp_path / "dir").ids) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--init=x"], "--images is missing"),
        (["--workdir=x", "--dense"], "--dense is only used with --images"),
        (["--init=x", "--images=y", "--step=3"], "--step cannot be combined with --init"),
        (["--workdir=x", "--images=y", "--split=train"], "--split cannot be combined with --images"),
        (["--init=x", "--images=y", "--layers=a"], "--layers is 'a'"),
        (["--init=x", "--images=y", "--nearest=0"], "--nearest is 0"),
        (["--init=x", "--images=y", "--csv=z"], "--csv=z is only used with --nearest"),
        (["--init=x", "--images=y", "--nearest=1", "--layers=0,1"], "--nearest compares the outputs of one layer"),
        (["--init=x", "--images=/nowhere", "--out=z.npz"], "--images=/nowhere is not a directory"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, words, capsys):
    assert features.main(arguments) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") <= 3


def test_positions_are_resampled_once_from_those_of_the_file(tmp_path):
    """Pictures get the size that the files record, 8x8; normalized images of the trained size are not resampled."""
    for name in ("model.safetensors", "config.json"):
        shutil.copy(FILE / name, tmp_path)
    recorded = {"do_resize": True, "size": {"height": 8, "width": 8}, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recorded))
    backbone = vit_jax.backbone(tmp_path)
    assert backbone.image_size == (8, 8)
    images = np.random.default_rng(3).normal(size=(2, 12, 12, 3)).astype(np.float32)
    np.testing.assert_array_equal(backbone(images)["class"], vit_jax.backbone(FILE)(images)["class"])
