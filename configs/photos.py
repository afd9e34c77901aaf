"""A classifier of your own photos: a folder that contains one folder of images per class.

    vit-jax train --config=photos --config.data.dir=PHOTOS
    vit-jax train --config=photos --config.data.dir=PHOTOS --workdir=runs/finetuned \
        --config.checkpoint.init_from=augreg-s16-in21k

For 50 to 5,000 photos. Without PHOTOS/test, 20 % of each class are held out to test on (docs/data.md); files that are
no images are skipped and reported. With `checkpoint.init_from` (a run, or weights that docs/weights.md lists), that
model is fine-tuned at its image size with a new head, which is much better than training from scratch. Without it, a
small model is trained from scratch on images of 64 pixels.
"""

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import paths
from vit_jax.data import folder, images
from vit_jax.errors import UserError

BATCH = 32
SIDE = 64  # pixels, from scratch; half of it for smaller pictures
# At least this many steps, and this many epochs.
SCRATCH = (300, 48)
FINE_TUNED = (200, 10)


def get_config() -> ConfigDict:
    """A model of 0.56 M parameters from scratch, for a small folder; `adapt` sets what depends on the command line."""
    config = options.default()
    config.model.update(variant="Ti/8", width=128, depth=4, heads=2, mlp_width=256, pooling="mean")
    config.model.position = "sincos_2d"
    config.data.update(name="folder", skip_broken=True, image_size=SIDE)
    config.augment.update(resized_crop=True, min_crop_area=0.35, flip=True)
    config.augment.update(brightness=0.3, contrast=0.3, saturation=0.3)
    config.optimizer.update(learning_rate=2e-3, weight_decay=0.05, gradient_clip=1.0, average_decay=0.98)
    config.train.update(batch_size=BATCH, label_smoothing=0.1, evaluation_batch_size=64)
    train_for(config, SCRATCH[0])
    return config


def train_for(config: ConfigDict, steps: int) -> None:
    """Sets the number of steps, with a tenth of warm-up and four evaluations."""
    config.train.update(steps=steps, evaluate_every=max(1, steps // 4))
    config.optimizer.warmup_steps = steps // 10
    config.checkpoint.every = config.train.evaluate_every
    config.log.every = max(1, steps // 12)


def adapt(config: ConfigDict, typed: set[str]) -> None:
    """Adapts the length and the image size to the photos, and everything to `checkpoint.init_from` if that is set.

    Args:
        config: with the options of the command line.
        typed: the names of these options; they are set again afterwards.

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
    median = images.median_size(train[: folder.SAMPLE])
    steps, epochs = SCRATCH
    if config.checkpoint.init_from is not None:
        steps, epochs = FINE_TUNED
        fine_tune(config)
    elif median is not None and min(median) < SIDE:
        config.data.image_size = SIDE // 2
        config.model.variant = "Ti/4"  # 64 patches, as before
    if "train.epochs" not in typed:
        typed_steps = config.train.steps if "train.steps" in typed else None
        size = BATCH if config.train.batch_size == "auto" else config.train.batch_size
        train_for(config, typed_steps or max(steps, epochs * len(train) // size))


def fine_tune(config: ConfigDict) -> None:
    """The model of `checkpoint.init_from` with a new head, at its image size, which is filled in later."""
    default = options.default()
    for key in ("width", "depth", "heads", "mlp_width", "pooling", "position"):
        config.model[key] = default.model[key]
    config.data.image_size = None
    config.model.variant = config.data.normalization = options.INIT_FROM
    config.checkpoint.init_head = "new"
    # Test accuracy on ten classes of Tiny ImageNet with 40 images each, from a CIFAR-10 model of 3.7 M parameters: 54 %
    # with 1e-3, 58 % with 2e-4, 44 % if only the head is trained, 48 % after 100 steps instead of 200, and 37 % from
    # scratch (100 test images, one seed). With 5 images per class: 44 %, and 43 % if only the head is trained.
    config.optimizer.update(learning_rate=2e-4, average_decay=0.0)
