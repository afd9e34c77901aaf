"""The pictures of a model that `vit-jax look` draws: one function for each value of --what."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8

from vit_jax import arguments
from vit_jax.classifier import Classifier
from vit_jax.errors import UserError, few, nearest
from vit_jax.evaluation import tokens
from vit_jax.models import intermediates
from vit_jax.models.vit import pixels_per_patch, position_at
from vit_jax.visualization import embeddings, figures, maps
from vit_jax.visualization.figures import Picture
from vit_jax.visualization.subject import Subject, first_head

NUM_FILTERS = 28  # as in arXiv 2010.11929, Fig. 7
MAX_KERNELS = 112  # that are drawn
MASKS = ("random", "causal", "local")


def filters(subject: Subject) -> Picture:
    """The filters of the patch embedding: their 28 leading principal components, and the kernels.

    arXiv 2010.11929, Fig. 7, left. With a stem, those of its first convolution. Arrays: `components`
    [28, height, width, channels] of length 1, `variance` [28], the share of each, and `kernels`, all of them.
    """
    kernels = embeddings.filters(subject.module, subject.parameters)
    if kernels.shape[-1] not in (1, 3):
        raise UserError(
            f"filters: images have {kernels.shape[-1]} channels\n"
            "  defined for grey and RGB images; choose another picture"
        )
    flat = kernels.reshape(len(kernels), -1)
    components, variance, _ = embeddings.principal_components(flat, NUM_FILTERS)
    components = components.reshape(-1, *kernels.shape[1:])
    order = np.argsort(-np.linalg.norm(flat, axis=1), kind="stable")[:MAX_KERNELS]
    what = "first convolution of the stem" if subject.module.stem is not None else "patch embedding"
    figure = figures.filters(
        components, kernels[order], variance, len(kernels), f"Filters of the {what}", subject.title
    )
    return Picture(figure, {"components": components, "variance": variance, "kernels": kernels})


def positions(subject: Subject, *, layer: Any = None) -> Picture:
    """How the position embedding relates each position to all others (arXiv 2010.11929, Fig. 7, centre).

    Array: `similarity` [rows, columns, rows, columns], as `embeddings.position_similarity` defines it for each kind.
    `layer`, from 0 or, from the end, -1, matters for position embeddings that each layer has of its own.
    """
    index = subject.check_layer(0 if layer is None else layer)
    if layer is not None and position_at(subject.module) != "layers":
        raise UserError(f"layer is {layer}, but the layers of this model have no positions of their own\n  omit it")
    similarity, kind = embeddings.position_similarity(subject.module, subject.parameters, subject.grid, index)
    where = "" if layer is None else f", {subject.describe_layer(index)}"
    title = f"Position embeddings ({subject.module.position}){where}"
    return Picture(figures.positions(similarity, kind, title, subject.title), {"similarity": similarity})


def distance(subject: Subject) -> Picture:
    """The mean attention distance of each head against depth, in pixels (arXiv 2010.11929, Fig. 7, right).

    Arrays: `distance` [depth, heads], the mean over the images, and `uniform`, that of equal weights.
    """
    about = subject.extra, subject.grid, pixels_per_patch(subject.module)
    per_image = subject.over_images(
        lambda _, inside: jnp.stack([maps.mean_distance(layer, *about) for layer in inside.weights], axis=1)
    )
    equal = jnp.ones((1, 1, subject.tokens, subject.tokens))
    uniform = np.asarray(maps.mean_distance(equal, *about))[0, 0]
    mean = per_image.mean(axis=0, dtype=np.float64)
    title = f"Mean attention distance over {len(per_image):,} images"
    return Picture(figures.distance(mean, float(uniform), title, subject.title), {"distance": mean, "uniform": uniform})


def attention(subject: Subject, *, layer: Any = None, patch: Any = None) -> Picture:
    """The attention of each head of a layer, over the images.

    The query is the patch (row, column) `patch`, or what the head of the model reads: the class token; without one, the
    mean over all patches; with attention pooling, the query of the pooling, unless `layer` or `patch` is given. `layer`
    is the last one by default. Array: `attention` [images, heads, rows, columns].
    """
    query, words = subject.query(patch)
    is_pooling = query == maps.POOLING and layer is None
    query, words = (maps.MEAN, maps.MEAN) if query == maps.POOLING and layer is not None else (query, words)
    index = subject.check_layer(-1 if layer is None else layer)

    def reduce(outputs: Any, inside: intermediates.Intermediates) -> Any:
        row = inside.pooling if is_pooling else maps.of_query(inside.weights[index], query, subject.extra)
        return outputs, maps.to_grid(row, subject.extra, subject.grid)

    outputs, found = subject.over_images(reduce)
    where = "" if is_pooling else f", {subject.describe_layer(index)}"
    titles = [f"head {head}" for head in range(found.shape[1])]
    figure = figures.maps(
        subject.images,
        found,
        titles,
        subject.captions(outputs),
        f"Attention of the {words}{where}",
        subject.title,
        patch,
    )
    return Picture(figure, {"attention": found})


def rollout(subject: Subject, *, patch: Any = None) -> Picture:
    """Attention rollout over the images (arXiv 2005.00928; 2010.11929, Figs. 6 and 14).

    It is that of the class token, of the mean over the patches, of the pooling's query averaged over its heads, or of
    the patch (row, column) `patch`. Array: `rollout` [images, rows, columns].
    """
    query, words = subject.query(patch)

    def reduce(outputs: Any, inside: intermediates.Intermediates) -> Any:
        return outputs, _read(maps.rollout(inside.weights), inside.pooling, query, subject)

    outputs, found = subject.over_images(reduce)
    title = f"Attention rollout of the {words}"
    figure = figures.maps(subject.images, found[:, None], [], subject.captions(outputs), title, subject.title, patch)
    return Picture(figure, {"rollout": found})


def relevance(subject: Subject, *, class_name: Any = None) -> Picture:
    """The relevance of each patch for a class: attention weighted by its gradients (arXiv 2103.15679).

    The class is `class_name` for all images, or the most probable one of each. Arrays: `relevance`
    [images, rows, columns] and `classes` [images].
    """
    if not subject.is_classifier:
        why = subject.model.no_head if subject.module.classes is None else "the model classifies each token"
        raise UserError(
            f"relevance: {why}, and relevance is that for the class of an image\n"
            "  use a classifier, or another picture, such as rollout"
        )
    chosen = _class_index(subject.model, class_name)

    def apply(parameters: Any, inputs: jax.Array) -> Any:
        def select(outputs: Any) -> jax.Array:
            logits = first_head(outputs)
            return (logits.max(axis=-1) if chosen is None else logits[:, chosen]).sum()

        variables = {"params": parameters}
        outputs, inside, gradients = intermediates.weight_gradients(subject.module, variables, inputs, select)
        joint, query = maps.relevance(inside.weights, gradients.weights), maps.query_of(subject.module)
        has_pooling = query == maps.POOLING
        pooling = maps.positive_part(inside.pooling, gradients.pooling)[:, None] if has_pooling else None
        return outputs, _read(joint, pooling, query, subject)

    outputs, found = subject.compute(apply)
    logits = first_head(outputs)
    classes = logits.argmax(axis=-1) if chosen is None else np.full(len(logits), chosen)
    figure = figures.maps(
        subject.images, found[:, None], [], subject.captions(outputs, classes), "Relevance for the class", subject.title
    )
    return Picture(figure, {"relevance": found, "classes": classes})


def features(subject: Subject, *, layer: Any = -1) -> Picture:
    """The first three principal components of the outputs of the patches, as red, green and blue.

    All images have the same components, so that equal colors are similar features (arXiv 2304.07193, Fig. 1). The
    features are the outputs of the block `layer` after the final norm, as of `vit-jax features --layers`. Arrays:
    `components` [images, rows, columns, 3], not scaled, and `variance` [3], the share of each.
    """
    index = subject.check_layer(layer)
    patches = subject.compute(
        lambda parameters, inputs: tokens.apply(subject.module, parameters, inputs, [index])["patches"][0]
    )
    flat = patches.reshape(-1, patches.shape[-1])
    basis, variance, mean = embeddings.principal_components(flat, 3)
    components = ((flat - mean) @ basis.T).reshape(*patches.shape[:3], -1)
    title = f"Principal components of the patches' features, {subject.describe_layer(index)}"
    figure = figures.features(subject.images, components, subject.captions(), title, subject.title)
    return Picture(figure, {"components": components, "variance": variance})


def patches(subject: Subject) -> Picture:
    """The images as the model reads them: resized, cut into patches, numbered in the order of the tokens.

    Array: `patches` [images, rows, columns, height, width, channels].
    """
    size, (rows, columns) = pixels_per_patch(subject.module), subject.grid
    images = subject.images
    parts = images.reshape(len(images), rows, size, columns, size, -1).swapaxes(2, 3)
    before = {"class token": int(subject.module.class_token), "registers": subject.module.registers}
    extra = " and ".join(f"{count} {name}" for name, count in before.items() if count)
    title = f"{rows} x {columns} patches of {size} x {size} pixels{extra and f', after {extra}'}"
    figure = figures.patches(parts, subject.extra, subject.captions(), title, subject.title)
    return Picture(figure, {"patches": parts})


def masks(subject: Subject, *, mask: Any = "random", layer: Any = 0) -> Picture:
    """An attention mask at work: the mask, and the attention of a layer without it and with it.

    True in a mask means that a query may attend to a key. `mask` is 'random' (half of the patches are hidden from all
    queries), 'causal' (from queries before them) or 'local' (from patches further away than a neighbour).
    Arrays: `mask` [tokens, tokens]; `without` and `attention` [images, tokens, tokens], means over the heads.
    """
    if not isinstance(mask, str) or mask not in MASKS:
        raise UserError(f"mask is {arguments.shown(mask)}\n  allowed: {', '.join(MASKS)}")
    index, allowed = subject.check_layer(layer), _mask(mask, subject.extra, subject.grid)

    def reduce(outputs: Any, inside: intermediates.Intermediates) -> Any:
        return outputs, inside.weights[index].mean(axis=1)

    plain_outputs, without = subject.over_images(reduce)
    outputs, found = subject.over_images(reduce, mask=allowed[None, None])
    (rows, columns), has_classes = subject.grid, subject.is_classifier
    attends_to_itself = np.diag(allowed)[subject.extra :].reshape(rows, columns)
    cells = np.argwhere(attends_to_itself)
    row, column = cells[np.abs(cells - [rows // 2, columns // 2]).sum(axis=1).argmin()].tolist()
    patch = row, column  # the query whose keys are drawn
    visible = allowed[subject.extra + row * columns + column, subject.extra :].reshape(rows, columns)
    captions = subject.captions(plain_outputs)
    masked = [line.rpartition("\n")[2] for line in subject.captions(outputs)] if has_classes else []
    title = f"Attention mask '{mask}', {subject.describe_layer(index)}, mean over heads"
    arrays = visible, allowed, without, found
    figure = figures.masks(subject.images, *arrays, captions, masked, patch, title, subject.title)
    return Picture(figure, {"mask": allowed, "without": without, "attention": found})


KINDS: dict[str, Callable[..., Picture]] = {
    "filters": filters,
    "positions": positions,
    "distance": distance,
    "attention": attention,
    "rollout": rollout,
    "relevance": relevance,
    "features": features,
    "patches": patches,
    "masks": masks,
}
OF_PARAMETERS = ("filters", "positions")  # these need no images


def options_of(what: str) -> tuple[str, ...]:
    """Returns the names of the options of a picture."""
    return tuple(inspect.signature(KINDS[what]).parameters)[1:]


def draw(
    what: str,
    model: Classifier,
    images: UInt8[np.ndarray, "images height width channels"] | None = None,
    names: Sequence[str] = (),
    title: str = "",
    **options: Any,
) -> Picture:
    """Returns a picture of a model.

    Args:
        what: one of `KINDS`.
        model: with its preprocessing.
        images: as `Classifier.read` returns them; None for pictures of the parameters: 'filters' and 'positions'.
        names: of the images, which are drawn below them.
        title: of the model; by default where its parameters come from.
        options: of the picture, as its function documents them.

    Raises:
        UserError: the picture is not defined for this model, or an option is wrong.
    """
    check(what, options)
    if images is not None and not len(images):
        raise UserError(f"{what}: there are no images\n  pass one or more images")
    if images is None and what not in OF_PARAMETERS:
        raise UserError(f"{what}: images are missing\n  pass one or more images")
    return KINDS[what](Subject(model, images, tuple(names), title or model.source), **options)


def check(what: str, options: Mapping[str, Any]) -> None:
    """Raises UserError if there is no such picture, or it has no such option."""
    if arguments.text("what", what) not in KINDS:
        near = nearest(what, KINDS)
        raise UserError(
            f"there is no picture {what!r}\n  {f'nearest: {near[0]}' if near else f'allowed: {few(KINDS, len(KINDS))}'}"
        )
    if wrong := [name for name in options if name not in options_of(what)]:
        having = [kind for kind in KINDS if wrong[0] in options_of(kind)]
        raise UserError(
            f"{what} has no option {wrong[0]}\n  omit it; it is for {few(having, len(KINDS)) or 'no picture'}"
        )


def _read(joint: jax.Array, pooling: jax.Array | None, query: str | int, subject: Subject) -> jax.Array:
    """Returns the map [batch, rows, columns] of what the head reads from the tokens' outputs."""
    if query == maps.POOLING:
        row = jnp.einsum("bt,btk->bk", pooling.astype(jnp.float32).mean(axis=1), joint, precision="highest")
    else:
        row = maps.of_query(joint, query, subject.extra)
    return maps.to_grid(row, subject.extra, subject.grid)


def _class_index(model: Classifier, class_name: Any) -> int | None:
    if class_name is None:
        return None
    class_name = arguments.text("class_name", class_name)
    names = next(iter(model.inputs.classes.values()))
    if class_name in names:
        return names.index(class_name)
    near = nearest(class_name, names, 3) or [name for name in names if class_name.lower() in name.lower()][:3]
    raise UserError(f"the model has no class {class_name!r}\n  {'nearest' if near else 'it has'}: {few(near or names)}")


def _mask(kind: str, extra: int, grid: tuple[int, int]) -> Bool[np.ndarray, "tokens tokens"]:
    """Returns a mask, True where a query (row) may attend to a key (column); tokens before the patches see all."""
    count = grid[0] * grid[1]
    if kind == "random":
        hidden = np.random.default_rng(0).permutation(count) < count // 2
        among = np.broadcast_to(~hidden, (count, count))
    elif kind == "causal":
        among = np.tri(count, dtype=bool)
    else:
        cells = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1).reshape(-1, 2)
        among = np.abs(cells[:, None] - cells[None]).max(axis=-1) <= 1
    allowed = np.ones((extra + count, extra + count), bool)
    allowed[extra:, extra:] = among
    if kind == "random":
        allowed[:extra, extra:] = ~hidden
    return allowed
