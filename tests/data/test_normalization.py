import pytest

from vit_jax.data import normalization, sources
from vit_jax.errors import UserError


def test_statistics_by_name():
    digits = sources.load("digits", "train")
    assert normalization.of_source("set", digits) == (digits.mean, digits.std)
    assert normalization.of_source("half", digits) == ((0.5,), (0.5,))
    assert normalization.constants("half", 3) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert normalization.constants("set", 3) is None
    # As in torchvision and timm.
    assert normalization.constants("imagenet", 3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_unknown_names_and_other_channels_are_refused():
    with pytest.raises(UserError, match=r"--normalize is 'data'\n  allowed: set, half, imagenet"):
        normalization.constants("data", 3, "--normalize")
    with pytest.raises(UserError, match=r"config\.data\.normalization is 'imagenet', and the images have 1 channels"):
        normalization.of_source("imagenet", sources.load("digits", "test"))
