"""A classifier of your own photos: a folder that contains one folder of images per class.

python -m vit_jax.main --config=configs/photos.py --config.data.dir=PHOTOS
python -m vit_jax.main --config=configs/photos.py --config.data.dir=PHOTOS --config.checkpoint.init_from=RUN_OR_FILE
"""

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import paths, terminal
from vit_jax.data import folder, images
from vit_jax.errors import UserError

SIDES = (32, 64)  # of images from scratch, pixels


def get_config() -> ConfigDict:
    """The options that do not depend on the photos or on the initial weights; `adapt` sets the others."""
    config = options.default()
    config.data.update(name="folder", skip_broken=True)
    config.augment.update(resized_crop=True, min_crop_area=0.35, flip=True)
    config.augment.update(brightness=0.3, contrast=0.3, saturation=0.3)
    config.optimizer.update(weight_decay=0.05, gradient_clip=1.0)
    config.train.update(batch_size=32, label_smoothing=0.1)
    return config


def adapt(config: ConfigDict) -> None:
    """Sets the options for fine-tuning if `checkpoint.init_from` is set, and otherwise those for training from scratch.

    Raises:
        UserError: `data.dir` is not set.
    """
    if config.data.dir is None:
        raise UserError(
            "config.data.dir is not set\n"
            "  set it to the folder that contains one folder of images per class: --config.data.dir=PHOTOS"
        )
    if config.checkpoint.init_from is None:
        from_scratch(config)
    else:
        fine_tune(config)
