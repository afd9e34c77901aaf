"""The masked autoencoder beside a slow version of it, image by image and patch by patch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.block_config import BlockConfig
from vit_jax.models.encoder import Encoder
from vit_jax.models.masked_autoencoder import MaskedAutoencoder, normalize_patches, pixel_statistics
from vit_jax.models.patches import patchify
from vit_jax.models.positions import sine_cosine_2d

FIELDS = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp_width": 12}
pytestmark = pytest.mark.usefixtures("quick_compilation")
KEYS = jax.random.split(jax.random.key(5), 3)


@pytest.fixture(scope="module")
def made(small, randomise, draw):
    """A function from fields of the backbone to a module, its random parameters, and images of 2 x 3 patches."""

    def make(**fields):
        backbone = small(classes=None, pooling="none", **fields)
        module, images = MaskedAutoencoder(backbone, masked=0.5, **FIELDS), draw(3, 4, 6, 2)
        return module, randomise(module, images)["params"], images

    return make


@functools.partial(jax.jit, static_argnums=0)
def apply(module, parameters, images):
    return module.apply({"params": parameters}, images, KEYS)


def slowly(module, parameters, images, hidden):
    """What the decoder says, in NumPy but for the Transformers' blocks, one image after another."""
    backbone, theirs, ours = module.backbone, parameters["backbone"], parameters["decoder"]
    extra = int(backbone.class_token) + backbone.registers
    outputs = []
    for image, mask in zip(np.asarray(images), np.asarray(hidden), strict=True):
        tokens = [theirs["class_token"][0, 0] + theirs["positions"]["table"][0, 0]] if backbone.class_token else []
        tokens += list(theirs["registers"][0]) if backbone.registers else []
        for row in range(2):
            for column in range(3):
                number = 3 * row + column
                if not mask[number]:
                    pixels = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1)
                    projection = theirs["embedding"]["projection"]
                    table = theirs["positions"]["table"][0, int(backbone.class_token) + number]
                    tokens.append(pixels @ projection["kernel"] + projection["bias"] + table)
        options = BlockConfig(heads=backbone.heads, mlp_width=backbone.mlp_width)
        seen = Encoder(backbone.depth, options).apply({"params": theirs["encoder"]}, jnp.stack(tokens)[None])[0]
        seen = list(seen @ ours["embedding"]["kernel"] + ours["embedding"]["bias"])
        filled, seen = seen[:extra], seen[extra:]
        for number, where in enumerate(sine_cosine_2d(2, 3, module.decoder_width)):
            filled.append((ours["mask_embedding"][0, 0] if mask[number] else seen.pop(0)) + where)
        assert not seen
        config = BlockConfig(heads=module.decoder_heads, mlp_width=module.decoder_mlp_width)
        decoder = Encoder(module.decoder_depth, config)
        decoded = decoder.apply({"params": ours["encoder"]}, jnp.stack(filled)[None])[0, extra:]
        outputs.append(decoded @ ours["pixels"]["kernel"] + ours["pixels"]["bias"])
    return jnp.stack(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"class_token": False, "registers": 2}], ids=str)
def test_it_is_what_the_slow_version_makes(made, fields):
    module, parameters, images = made(**fields)
    outputs, hidden = apply(module, parameters, images)
    assert (hidden.sum(axis=1) == 3).all() and len({tuple(row) for row in np.asarray(hidden)}) > 1
    np.testing.assert_allclose(outputs, slowly(module, parameters, images, hidden), atol=1e-5)


@pytest.mark.slow
def test_ready_made_patches_are_taken_too(made, draw):
    module, parameters, _ = made(position="sincos_2d")
    images = draw(3, 4, 4, 2)
    from_images = apply(module, parameters, images)
    from_patches = apply(module, parameters, patchify(images, 2))
    jax.tree.map(np.testing.assert_array_equal, from_images, from_patches)


@pytest.mark.slow
def test_no_pixel_of_a_hidden_patch_is_read(made):
    """Not a bit of the result depends on what is hidden, and every bit that is seen does matter."""
    module, parameters, images = made()
    outputs, hidden = apply(module, parameters, images)
    grid = np.asarray(hidden).reshape(3, 2, 3).repeat(2, 1).repeat(2, 2)[..., None]
    others, _ = apply(module, parameters, jnp.where(grid, images + 7.0, images))
    np.testing.assert_array_equal(outputs, others)
    for patch in np.flatnonzero(~np.asarray(hidden)[0]):
        row, column = divmod(int(patch), 3)
        changed = np.array(images)
        changed[0, 2 * row, 2 * column, 0] += 1
        others, _ = apply(module, parameters, jnp.asarray(changed))
        assert np.abs(others[0] - outputs[0]).max() > 1e-4


def test_patches_are_normalised_by_their_own_mean_and_unbiased_variance(draw):
    patches = np.asarray(3 * draw(2, 5, 12) + 1, np.float64)
    wanted = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    inputs = jnp.asarray(patches, jnp.float32)
    np.testing.assert_allclose(normalize_patches(inputs), wanted, rtol=1e-4, atol=1e-5)
    mean, std = pixel_statistics(inputs)
    np.testing.assert_allclose(normalize_patches(inputs) * std + mean, patches, atol=1e-5)
    assert np.isfinite(normalize_patches(jnp.ones((1, 2, 1)))).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"position": "rotary"},
            "applied at 'layers', which needs all patches: to encode only some, use one of none, learned, ",
        ),
        ({"position": "learned", "position_at": "shared"}, "applied at 'shared'"),
        ({"position": "learned_rotary"}, "which needs all patches"),
        ({"pooling": "mean"}, "pooling 'mean'"),
        ({"classes": 3}, "classes is 3"),
        ({"stem": (1,), "stem_width": 32}, "stem is"),
    ],
)
def test_backbones_that_cannot_encode_a_part_of_the_patches_are_refused(small, fields, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(small(**{"classes": None, "pooling": "none", **fields}))


def test_a_decoder_of_an_odd_width_is_refused(small):
    with pytest.raises(ValueError, match="decoder_width is 6"):
        MaskedAutoencoder(small(classes=None, pooling="none"), decoder_width=6, decoder_heads=2)


def test_a_model_with_positions_in_the_layers_encodes_all_patches(small, draw):
    model = small(position="relative")
    with pytest.raises(ValueError, match="positions are applied at 'layers'"):
        model.init(jax.random.key(0), draw(1, 4, 4, 3), visible=jnp.zeros((1, 2), jnp.int32))
