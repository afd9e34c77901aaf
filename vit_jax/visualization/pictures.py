"""One picture of a model for each value of `look --what`."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from vit_jax.classifier import Classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A figure, and the arrays that it shows.

    Attributes:
        figure: of matplotlib.
        arrays: by name, as documented with the function that computes them.
    """

    figure: "Figure"
    arrays: dict[str, np.ndarray]


def draw(what: str, model: Classifier, images: UInt8[np.ndarray, "images height width channels"] | None) -> Picture:
    """Returns a picture of a model.

    Args:
        what: 'filters', 'positions', 'distance', 'attention', 'rollout', 'features', 'patches', 'masks', 'relevance'.
        model: with its preprocessing.
        images: as `Classifier.read` returns them; None for pictures of parameters alone: 'filters' and 'positions'.

    Raises:
        UserError: the picture is not defined for this model.
    """
    raise NotImplementedError
