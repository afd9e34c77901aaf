import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import masking

KEYS = jax.random.split(jax.random.key(3), 20_000)


def test_so_many_patches_are_hidden_and_each_as_often_as_the_others():
    hidden = np.asarray(masking.draw_hidden(KEYS, 12, 5))
    assert (hidden.sum(axis=1) == 5).all()
    # Five of twelve, with a standard deviation of sqrt(5/12 * 7/12 / 20000) = 0.0035.
    np.testing.assert_allclose(hidden.mean(axis=0), 5 / 12, atol=5 * 0.0035)
    # Any two of them together: 5/12 * 4/11.
    together = (hidden.T.astype(float) @ hidden) / len(hidden)
    np.testing.assert_allclose(together[~np.eye(12, dtype=bool)], 5 / 12 * 4 / 11, atol=5 * 0.0026)


@pytest.mark.slow
def test_what_is_hidden_of_an_image_depends_on_its_key_alone():
    whole = masking.draw_hidden(KEYS[:8], 9, 4)
    for image in (0, 3, 7):
        np.testing.assert_array_equal(masking.draw_hidden(KEYS[image : image + 1], 9, 4)[0], whole[image])


def test_visible_indices_are_the_others_in_order():
    hidden = masking.draw_hidden(KEYS[:50], 9, 4)
    indices = masking.visible_indices(hidden, 4)
    for row, mask in zip(np.asarray(indices), np.asarray(hidden), strict=True):
        assert row.tolist() == [index for index in range(9) if not mask[index]]


def test_tokens_are_gathered_by_index(draw):
    tokens, indices = draw(3, 5, 2), jnp.asarray([[4, 0], [1, 1], [2, 3]])
    gathered = masking.take(tokens, indices)
    for image in range(3):
        np.testing.assert_array_equal(gathered[image], np.asarray(tokens)[image][np.asarray(indices)[image]])


@pytest.mark.parametrize(
    ("share", "patches", "count"), [(0.75, 64, 48), (0.5, 9, 4), (0.01, 9, 1), (0.999, 9, 8), (0.5, 2, 1)]
)
def test_some_are_hidden_and_some_are_not(share, patches, count):
    assert masking.hidden_count(share, patches) == count


def test_one_patch_is_too_few():
    with pytest.raises(ValueError, match="1 patch"):
        masking.hidden_count(0.5, 1)
