import jax
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax.models.resampling import resample, resample_positions, resample_tokens


def test_bilinear_is_what_the_published_code_does(goldens):
    arrays = np.load(goldens / "posemb_resize.npz")
    for source, result, old, new in (
        ("src_token", "up_token", 8, 12),
        ("src_token", "down_token", 8, 5),
        ("src_gap", "up_gap", 8, 12),
    ):
        found = resample_tokens(jax.numpy.asarray(arrays[source]), (old, old), (new, new))
        np.testing.assert_allclose(found, arrays[result], atol=1e-6)


def bilinear(table, grid):
    """Point by point, corners on corners."""
    rows, columns, _ = table.shape
    result = np.zeros((*grid, table.shape[-1]))
    for r in range(grid[0]):
        for c in range(grid[1]):
            y = r * (rows - 1) / max(grid[0] - 1, 1)
            x = c * (columns - 1) / max(grid[1] - 1, 1)
            top, left = min(int(y), max(rows - 2, 0)), min(int(x), max(columns - 2, 0))
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            y, x = y - top, x - left
            result[r, c] = (1 - y) * ((1 - x) * table[top, left] + x * table[top, right])
            result[r, c] += y * ((1 - x) * table[bottom, left] + x * table[bottom, right])
    return result


def keys(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def bicubic(table, grid):
    """One axis after the other, weight by weight, over a kernel that grows as the grid shrinks."""
    for axis, new in enumerate(grid):
        old = table.shape[axis]
        stretch = max(old / new, 1)
        weights = np.zeros((new, old))
        for i in range(new):
            centre = (i + 0.5) * old / new - 0.5
            weights[i] = [keys((j - centre) / stretch) for j in range(old)]
            weights[i] /= weights[i].sum()
        table = np.moveaxis(np.tensordot(weights, table, (1, axis)), 0, axis)
    return table


def bicubic_no_antialias(table, grid):
    """Four points around each new one, those beyond the edge repeated."""

    def weight(x):
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    for axis, new in enumerate(grid):
        old, rows = table.shape[axis], np.moveaxis(table, axis, 0)
        made = []
        for i in range(new):
            centre = (i + 0.5) * old / new - 0.5
            taps = range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3)
            made.append(sum(weight(centre - tap) * rows[min(max(tap, 0), old - 1)] for tap in taps))
        table = np.moveaxis(np.stack(made), 0, axis)
    return table


@pytest.mark.parametrize("slow", [bilinear, bicubic, bicubic_no_antialias])
@pytest.mark.parametrize("grid", [(5, 7), (9, 3), (2, 11), (1, 4), (6, 5)])
def test_any_grid_up_and_down(draw, slow, grid):
    table = draw(6, 5, 3)
    np.testing.assert_allclose(resample(table, grid, slow.__name__), slow(np.float64(table), grid), atol=2e-6)


def test_the_same_grid_is_the_same_table(draw):
    table = draw(1, 14, 3)
    np.testing.assert_array_equal(resample_tokens(table, (3, 4), (3, 4), "bicubic"), table)


@pytest.mark.parametrize("at", ["input", "layers"])
def test_class_tokens_row_is_kept_and_every_table_found(small, randomise, draw, at):
    model = small(position="learned", position_at=at, registers=2)
    parameters = randomise(model, draw(1, 6, 8, 3))["params"]
    moved = resample_positions(parameters, (3, 4), (5, 2))
    expected = jax.eval_shape(model.init, jax.random.key(0), draw(1, 10, 4, 3))["params"]
    assert jax.tree.map(np.shape, moved) == jax.tree.map(np.shape, expected)
    pick = (lambda tree: tree["positions"]) if at == "input" else (lambda tree: tree["encoder"]["block_1"]["positions"])
    np.testing.assert_array_equal(pick(moved)["table"][:, 0], pick(parameters)["table"][:, 0])
    assert moved["head"]["logits"]["kernel"] is parameters["head"]["logits"]["kernel"]


@pytest.mark.parametrize("scan", mostly_slow([False, True], 2))
@pytest.mark.parametrize("method", mostly_slow(["bilinear", "bicubic"], 2))
@pytest.mark.parametrize("position", ["learned", "learned_2d", "relative"])
def test_every_learned_kind_resamples_to_a_table_that_fits(small, randomise, draw, position, method, scan):
    model = small(position=position, position_at="layers", scan=scan)
    parameters = randomise(model, draw(1, 6, 8, 3))["params"]
    moved = resample_positions(parameters, (3, 4), (2, 6), method)
    expected = jax.eval_shape(model.init, jax.random.key(0), draw(1, 4, 12, 3))["params"]
    assert jax.tree.map(np.shape, moved) == jax.tree.map(np.shape, expected)


def test_rows_columns_and_offsets_resample_as_images_do(randomise, small, draw):
    parameters = {
        "positions": {"rows": draw(3, 2), "columns": draw(4, 2, seed=1)},
        "encoder": {"block_0": {"positions": {"offsets": draw(2, 5, 7, seed=2)}}},
    }
    moved = resample_positions(parameters, (3, 4), (5, 2))
    rows = bilinear(np.float64(parameters["positions"]["rows"])[:, None], (5, 1))[:, 0]
    columns = bilinear(np.float64(parameters["positions"]["columns"])[None], (1, 2))[0]
    offsets = np.float64(parameters["encoder"]["block_0"]["positions"]["offsets"])
    offsets = np.stack([bilinear(head[..., None], (9, 3))[..., 0] for head in offsets])
    np.testing.assert_allclose(moved["positions"]["rows"], rows, atol=1e-6)
    np.testing.assert_allclose(moved["positions"]["columns"], columns, atol=1e-6)
    np.testing.assert_allclose(moved["encoder"]["block_0"]["positions"]["offsets"], offsets, atol=1e-6)


def test_what_does_not_fit_is_refused(draw):
    with pytest.raises(ValueError, match="method is 'nearest': one of bilinear, bicubic"):
        resample(draw(2, 2, 3), (3, 3), "nearest")
    with pytest.raises(ValueError, match="a table with 8 rows cannot be for a grid of 3x3"):
        resample_tokens(draw(1, 8, 2), (3, 3), (4, 4))
    with pytest.raises(ValueError, match=r"positions 'rows' of shape \(2, 3\) are not for a grid of 3x3"):
        resample_positions({"positions": {"rows": draw(2, 3)}}, (3, 3), (4, 4))
