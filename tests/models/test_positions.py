import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.attention_backends import attention_weights
from vit_jax.models.positions import POSITIONS, TokenLayout, rotate, sine_cosine_2d, sinusoidal

LAYOUT = TokenLayout(rows=3, columns=4, class_token=1, registers=2, width=8, head_size=8, heads=2)


def terms(name, randomise, layout=LAYOUT):
    module = POSITIONS[name](layout)
    variables = randomise(module)
    return module.apply(variables), variables.get("params", {})


def test_none_contributes_nothing(randomise):
    assert terms("none", randomise) == ((None, None, None), {})


def test_learned_has_a_row_for_the_class_token_and_none_for_registers(randomise):
    (table, bias, rotation), parameters = terms("learned", randomise)
    assert bias is None and rotation is None
    assert parameters["table"].shape == (1, 13, 8)
    np.testing.assert_array_equal(table[0, 0], parameters["table"][0, 0])
    np.testing.assert_array_equal(table[0, 1:3], np.zeros((2, 8)))
    np.testing.assert_array_equal(table[0, 3:], parameters["table"][0, 1:])


def test_learned_2d_is_the_row_beside_the_column(randomise):
    (table, _, _), parameters = terms("learned_2d", randomise)
    assert parameters["rows"].shape == (3, 4) and parameters["columns"].shape == (4, 4)
    np.testing.assert_array_equal(table[0, :3], np.zeros((3, 8)))
    for patch in range(12):
        row, column = divmod(patch, 4)
        expected = np.concatenate([parameters["rows"][row], parameters["columns"][column]])
        np.testing.assert_array_equal(table[0, 3 + patch], expected)


def test_sinusoidal_follows_its_formula(randomise):
    table = sinusoidal(50, 6)
    for position in range(50):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            np.testing.assert_allclose(table[position, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-6)
    (added, _, _), parameters = terms("sinusoidal", randomise)
    assert parameters == {}
    np.testing.assert_array_equal(added[0], np.concatenate([np.zeros((3, 8)), sinusoidal(12, 8)]).astype(np.float32))


def test_sine_cosine_2d_keeps_the_coordinates_of_another_grid():
    np.testing.assert_array_equal(sine_cosine_2d(4, 4, 8, side=4), sine_cosine_2d(4, 4, 8))
    # Twelve rows and six columns where eight of each were: centres 2/3 of a row and 4/3 of a column apart.
    made = sine_cosine_2d(12, 6, 8, side=8).reshape(12, 6, 4, 2)
    for row, column in ((0, 0), (11, 5), (7, 2)):
        right, down = (column + 0.5) * 4 / 3 - 0.5, (row + 0.5) * 2 / 3 - 0.5
        np.testing.assert_allclose(
            made[row, column, :, 0], np.array([f(x) for x in (right, down) for f in (np.sin, np.cos)]), atol=1e-6
        )


def test_sine_cosine_2d_follows_its_formula(randomise):
    table = sine_cosine_2d(3, 4, 12)
    for patch in range(12):
        row, column = divmod(patch, 4)
        for i in range(3):
            frequency = 10_000 ** (-i / 2)
            expected = [np.sin(column * frequency), np.cos(column * frequency)]
            expected += [np.sin(row * frequency), np.cos(row * frequency)]
            np.testing.assert_allclose(table[patch, i::3], expected, atol=1e-6)
    (added, _, _), parameters = terms("sincos_2d", randomise)
    assert parameters == {}
    np.testing.assert_array_equal(added[0, 3:], sine_cosine_2d(3, 4, 8))


def test_relative_bias_depends_on_the_offset_alone(randomise):
    (_, bias, _), parameters = terms("relative", randomise)
    assert bias.shape == (1, 2, 15, 15) and parameters["offsets"].shape == (2, 5, 7)
    np.testing.assert_array_equal(bias[0, :, :3], np.zeros((2, 3, 15)))
    np.testing.assert_array_equal(bias[0, :, :, :3], np.zeros((2, 15, 3)))
    for query in range(12):
        for key in range(12):
            down, right = key // 4 - query // 4, key % 4 - query % 4
            np.testing.assert_array_equal(bias[0, :, 3 + query, 3 + key], parameters["offsets"][:, down + 2, right + 3])


def test_the_bias_is_added_to_the_scaled_scores(draw):
    queries, keys, bias = draw(2, 4, 3, 8), draw(2, 5, 3, 8, seed=1), draw(1, 3, 4, 5, seed=2)
    scores = np.einsum("bqhd,bkhd->bhqk", np.float64(queries), np.float64(keys)) / np.sqrt(8) + np.float64(bias)
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(attention_weights(queries, keys, bias=bias), expected, atol=2e-6)


def test_rotary_turns_points_of_the_plane_by_column_and_row(randomise, draw):
    (_, _, (cosines, sines)), parameters = terms("rotary", randomise)
    assert parameters == {} and cosines.shape == (15, 4)
    vectors = draw(1, 15, 2, 8)
    turned = np.asarray(rotate(vectors, cosines, sines))
    np.testing.assert_array_equal(turned[:, :3], vectors[:, :3])
    points = np.asarray(vectors[..., :4] + 1j * vectors[..., 4:])
    for patch in range(12):
        row, column = divmod(patch, 4)
        angles = np.array([column, column / 10, row, row / 10])
        expected = points[0, 3 + patch] * np.exp(1j * angles)
        found = turned[0, 3 + patch, :, :4] + 1j * turned[0, 3 + patch, :, 4:]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rotary_scores_depend_on_the_offset_alone(randomise, draw):
    layout = TokenLayout(rows=5, columns=6, class_token=0, registers=0, width=8, head_size=16, heads=1)
    (_, _, rotation), _ = terms("rotary", randomise, layout)
    # The same query and the same key everywhere.
    query, key = (jnp.broadcast_to(draw(1, 1, 1, 16, seed=seed), (1, 30, 1, 16)) for seed in (0, 1))
    scores = np.einsum("qd,kd->qk", rotate(query, *rotation)[0, :, 0], rotate(key, *rotation)[0, :, 0])
    by_offset = {}
    for q in range(30):
        for k in range(30):
            by_offset.setdefault((k // 6 - q // 6, k % 6 - q % 6), []).append(scores[q, k])
    assert len(by_offset) == 9 * 11
    assert max(np.ptp(values) for values in by_offset.values()) < 1e-5
    assert np.ptp([values[0] for values in by_offset.values()]) > 1


def positions_of(model, images):
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    blocks = [shapes["encoder"][f"block_{index}"].get("positions") for index in range(model.depth)]
    return shapes.get("positions"), blocks


@pytest.mark.parametrize("name", ["learned", "learned_2d", "relative"])
def test_layers_have_their_own_and_shared_ones_are_once(small, draw, name):
    images = draw(1, 4, 4, 3)
    once, blocks = positions_of(small(position=name, position_at="shared"), images)
    assert once and blocks == [None, None]
    once, blocks = positions_of(small(position=name, position_at="layers"), images)
    assert once is None and all(blocks)


@pytest.mark.slow
def test_a_table_in_every_layer_is_added_before_each_block(small, randomise, draw):
    images, at_input = draw(2, 4, 4, 3), small(depth=1, position="learned")
    variables = randomise(at_input, images)
    expected = at_input.apply(variables, images)
    # With one block, the three places are the same one.
    np.testing.assert_allclose(at_input.clone(position_at="shared").apply(variables, images), expected, atol=1e-6)
    parameters = dict(variables["params"])
    block = {**parameters["encoder"]["block_0"], "positions": parameters.pop("positions")}
    parameters["encoder"] = {**parameters["encoder"], "block_0": block}
    own = at_input.clone(position_at="layers").apply({"params": parameters}, images)
    np.testing.assert_allclose(own, expected, atol=1e-6)


@pytest.mark.slow
def test_concatenated_positions_are_the_last_channels(small, randomise, draw):
    from vit_jax.models.intermediates import apply_with_intermediates

    images = draw(2, 2, 8, 3)
    model = small(depth=1, position="sincos_2d", position_width=4)
    variables = randomise(model, images)
    assert variables["params"]["embedding"]["projection"]["kernel"].shape == (12, 12)
    _, inside = apply_with_intermediates(model, variables, images)
    assert inside.embedded.shape == (2, 5, 16)
    for example in range(2):
        np.testing.assert_array_equal(inside.embedded[example, 1:, 12:], sine_cosine_2d(1, 4, 4))
    np.testing.assert_array_equal(inside.embedded[:, 0], np.repeat(variables["params"]["class_token"][0], 2, 0))


def test_patches_tell_their_grid_where_a_position_needs_it(small, randomise, draw):
    from vit_jax.models.patches import patchify

    images = draw(1, 4, 8, 3)
    model = small(depth=1, position="sincos_2d")
    apply = jax.jit(model.apply, static_argnames="grid")
    variables = randomise(model, images)
    expected = apply(variables, images)
    np.testing.assert_allclose(apply(variables, patchify(images, 2), grid=(2, 4)), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"8 patches do not form a square.*pass them as grid"):
        model.apply(variables, patchify(images, 2))
    with pytest.raises(ValueError, match="grid is 3x3, but there are 8 patches"):
        model.apply(variables, patchify(images, 2), grid=(3, 3))


ANGLES = {  # of a patch: the coordinates along the first and the second half of the pairs, and the temperature
    "rotary": (lambda row, column, rows, columns, side: (column, row), 100),
    "dinov3": (
        lambda row, column, rows, columns, side: tuple(
            2 * np.pi * ((2 * x + 1) / n - 1) for x, n in ((row, rows), (column, columns))
        ),
        100,
    ),
    "eva02": (lambda row, column, rows, columns, side: (row * side / rows, column * side / columns), 10_000),
    "pe": (lambda row, column, rows, columns, side: ((column + 1) * side / columns, (row + 1) * side / rows), 10_000),
}


@pytest.mark.parametrize("name", sorted(ANGLES))
def test_angles_follow_their_formula(randomise, name):
    coordinates, temperature = ANGLES[name]
    layout = TokenLayout(rows=3, columns=4, class_token=1, registers=2, width=8, head_size=8, heads=2, grid=6)
    (_, _, (cosines, sines)), _ = terms(name, randomise, layout)
    learned = f"learned_{name}"
    if learned in POSITIONS:
        (table, _, rotation), parameters = terms(learned, randomise, layout)
        assert parameters["table"].shape == (1, 13, 8) and table.shape == (1, 15, 8)
        np.testing.assert_array_equal(rotation, (cosines, sines))
    np.testing.assert_array_equal(sines[:3], np.zeros((3, 4)))
    for patch in range(12):
        first, second = coordinates(*divmod(patch, 4), 3, 4, 6)
        angles = [x / temperature ** (i / 2) for x in (first, second) for i in range(2)]
        np.testing.assert_allclose(cosines[3 + patch], np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(sines[3 + patch], np.sin(angles), atol=1e-6)


def test_relative_class_has_three_more_biases_per_head(randomise):
    layout = TokenLayout(rows=2, columns=3, class_token=1, registers=0, width=8, head_size=8, heads=2)
    (_, bias, _), parameters = terms("relative_class", randomise, layout)
    offsets, extra = parameters["offsets"], parameters["class"]
    assert extra.shape == (2, 3)
    for query in range(7):
        for key in range(7):
            if query and key:
                (y, x), (v, u) = divmod(query - 1, 3), divmod(key - 1, 3)
                expected = offsets[:, v - y + 1, u - x + 2]
            else:
                expected = extra[:, 2 if query == key else 0 if query == 0 else 1]
            np.testing.assert_array_equal(bias[0, :, query, key], expected)
