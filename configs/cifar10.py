"""CIFAR-10 from scratch at 32 pixels.

    vit-jax train --config=cifar10:cpu

On two CPU cores (AMD EPYC with AVX-512; jax 0.10.2, float32), shared with other jobs: 9:50 of training, test accuracy
61.32 % on all 10,000 images at the last step (seed 0).

    vit-jax train --config=cifar10            # width 192, depth 9, 300 epochs
    vit-jax train --config=cifar10:S,long

These are for an accelerator, and not measured as shipped. A `lite` model reached 94.17 % (10 test-time views, one seed)
on one H200 in 3:50 with other options: docs/performance.md has the commands. The argument is a size, a length, or both,
separated by a comma:

    full    width 192, depth 9, 2.7 M parameters: the plain ViT of arXiv 2112.13492 (default size)
    lite    width 256, depth 7, 3.7 M: ViT-Lite-7/4 of arXiv 2104.05704
    Ti      width 192, depth 12, 5.4 M: Ti/4
    S       width 384, depth 12, 21.3 M: S/4

    short   100 epochs; the default is 300
    long    1,000 epochs
    cpu     2,000 steps with light augmentation; without a size: width 128, depth 4, 0.54 M parameters
"""

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.errors import UserError

SIZES = {
    "full": {"variant": "Ti/4", "depth": 9, "heads": 12, "mlp_width": 384, "qkv_bias": False},
    "lite": {"variant": "Ti/4", "width": 256, "depth": 7, "heads": 4, "mlp_width": 512},
    "Ti": {"variant": "Ti/4"},
    "S": {"variant": "S/4"},
}
LENGTHS = {"short": 100, "long": 1000, "cpu": None}
ARGUMENTS = f"a size ({', '.join(SIZES)}), a length ({', '.join(LENGTHS)}), or both, for example S,long"
EPOCHS = 300
TEN_EPOCHS = 975  # steps of 512 examples


def get_config(argument: str = "full") -> ConfigDict:
    """The config for a size, a length, or both: `S`, `long`, `S,long`."""
    words = [word.strip() for word in argument.split(",")]
    sizes, lengths = ([word for word in words if word in known] for known in (SIZES, LENGTHS))
    if len(sizes) > 1 or len(lengths) > 1 or len(sizes) + len(lengths) < len(words):
        raise UserError(f"configs/cifar10.py:{argument}: unknown argument\n  allowed: {ARGUMENTS}")
    config = options.default()
    config.data.name = "cifar10"
    if lengths == ["cpu"]:
        cpu(config)
        if sizes:  # the size alone changes: not pooling, positions or length
            config.model.update(width=None, depth=None, heads=None, mlp_width=None)
            config.model.update(SIZES[sizes[0]])
    else:
        full(config, LENGTHS[lengths[0]] if lengths else EPOCHS)
        config.model.update(SIZES[sizes[0] if sizes else "full"])
    return config


def full(config: ConfigDict, epochs: int) -> None:
    """The baseline recipe of arXiv 2112.13492, whose authors report 93.58 %.

    Random crops and flips, AutoAugment, random erasing with probability 0.25; mixup or CutMix, with equal probability,
    on half of the batches. The paper's batches of 128 at a learning rate of 1e-3 leave a GPU idle: batches are four
    times as large here, and the learning rate is scaled by the square root of that.
    """
    config.model.stochastic_depth = 0.1
    config.augment.update(crop_padding=4, flip=True, policy="auto_augment", erasing=0.25)
    config.augment.update(mixup=1.0, cutmix=1.0, mix_switch=0.5, mix_probability=0.5, mix_per="batch")
    config.optimizer.update(learning_rate=2e-3, warmup_steps=TEN_EPOCHS, weight_decay=0.05)
    config.train.update(batch_size=512, epochs=epochs, label_smoothing=0.1, evaluate_every=TEN_EPOCHS)
    config.checkpoint.every = TEN_EPOCHS
    config.log.every = 65


def cpu(config: ConfigDict) -> None:
    """Width 128, depth 4, 2,000 steps: ten minutes on two CPU cores."""
    config.model.update(variant="Ti/4", width=128, depth=4, heads=2, mlp_width=256, pooling="mean")
    # A fixed embedding encodes from the first step which patches are neighbours. Validation accuracy on 2,000 images
    # after 400 steps (of 400): 44.4 %, compared with 39.5 % for a learned one.
    config.model.position = "sincos_2d"
    config.augment.update(crop_padding=2, flip=True)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=200, weight_decay=0.05, gradient_clip=1.0)
    config.train.update(batch_size=128, steps=2000, evaluate_every=500, evaluation_batch_size=250)
    config.checkpoint.every = 500
