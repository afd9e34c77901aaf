"""What a run learns: classification, or reconstruction of masked patches."""

from ml_collections import ConfigDict

from vit_jax.objectives.base import Objective
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.masked import Autoencoding, PatchPrediction

OBJECTIVES: dict[str, type[Objective]] = {
    "classify": Classification,
    "masked_patches": PatchPrediction,
    "masked_autoencoder": Autoencoding,
}


def make(config: ConfigDict) -> Objective:
    """Returns the objective that `config.train.objective` names."""
    return OBJECTIVES[config.train.objective].from_config(config)
