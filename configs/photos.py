"""A classifier of your own photos: a folder that contains one folder of images per class.

    python -m vit_jax.main --config=configs/photos.py --config.data.dir=PHOTOS
    python -m vit_jax.main --config=configs/photos.py --config.data.dir=PHOTOS --config.checkpoint.init_from=NAME_OR_RUN

For 50 to 5,000 photos. Without PHOTOS/test, 20 % of each class are held out to test on (docs/data.md); files that are
no images are skipped and reported. With `checkpoint.init_from` (a run, or weights that docs/weights.md lists), that
model is fine-tuned at its image size with a new head: much better than training from scratch, and the only way that
works for few photos. Without it, a small model is trained from scratch on images of 64 pixels.
"""

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import paths
from vit_jax.data import folder, images
from vit_jax.errors import UserError

SIDE = 64  # pixels, from scratch; half of it for smaller pictures
# At least this many steps, and this many epochs.
SCRATCH = (600, 30)
FINE_TUNED = (200, 10)


def get_config() -> ConfigDict:
    """The options that depend neither on the photos nor on the initial weights; `adapt` sets the others."""
    config = options.default()
    config.data.update(name="folder", skip_broken=True)
    config.augment.update(resized_crop=True, min_crop_area=0.35, flip=True)
    config.augment.update(brightness=0.3, contrast=0.3, saturation=0.3)
    config.optimizer.update(name="adamw", weight_decay=0.05, gradient_clip=1.0)
    config.train.update(batch_size=32, label_smoothing=0.1, evaluation_batch_size=64)
    return config


def adapt(config: ConfigDict) -> None:
    """Sets the options for fine-tuning if `checkpoint.init_from` is set, and otherwise those for training from scratch.

    Raises:
        UserError: `data.dir` is not set, or is not a folder of class folders.
    """
    if config.data.dir is None:
        raise UserError(
            "config.data.dir is not set\n"
            "  set it to the folder that contains one folder of images per class: --config.data.dir=PHOTOS"
        )
    root = paths.expand(config.data.dir, "config.data.dir")
    train = [root / name for name, _ in folder.find(root)[1].get("train", [])]
    if config.checkpoint.init_from is None:
        from_scratch(config, images.median_size(train[: folder.SAMPLE]))
        steps, epochs = SCRATCH
    else:
        fine_tune(config)
        steps, epochs = FINE_TUNED
    if config.train.epochs is None:
        config.train.steps = config.train.steps or max(steps, epochs * len(train) // config.train.batch_size)
        config.train.evaluate_every = config.checkpoint.every = max(1, config.train.steps // 4)
        config.log.every = max(1, config.train.steps // 12)
        config.optimizer.warmup_steps = config.train.steps // 10


def from_scratch(config: ConfigDict, size: tuple[int, int] | None) -> None:
    """A model of 0.54 M parameters, on images of at most the median `size` (height, width) of the pictures."""
    config.data.image_size = SIDE if size is None or min(size) >= SIDE else SIDE // 2
    variant = "Ti/8" if config.data.image_size == SIDE else "Ti/4"  # 64 patches
    config.model.update(variant=variant, width=128, depth=4, heads=2, mlp_width=256, pooling="mean")
    config.model.position = "sincos_2d"
    config.optimizer.update(learning_rate=2e-3, average_decay=0.98)


def fine_tune(config: ConfigDict) -> None:
    """The model of `checkpoint.init_from` with a new head, at its image size."""
    config.model.variant = config.data.normalization = options.INIT_FROM
    config.checkpoint.init_head = "new"
    config.optimizer.learning_rate = 2e-4
