"""Fine-tuning as in arXiv 2010.11929, table 4: a pre-trained model, a new head of zeros, images of 384 pixels.

    python -m vit_jax.main --config=configs/finetune.py:cifar10 --config.checkpoint.init_from=ViT-B_16.npz
    python -m vit_jax.main --config=configs/finetune.py:folder --config.data.dir=/data/flowers \
        --config.checkpoint.init_from=augreg-b16-224
    python -m vit_jax.main --config=configs/finetune.py:cifar100,cpu --config.checkpoint.init_from=runs/cifar10-cpu

For an accelerator, but for `cpu`; measured is `cifar10,cpu` alone, at 32 pixels (docs/finetuning.md). The model is the
one that init_from holds: a run's folder or any file of docs/weights.md. The learning rate is a set's own matter:
python -m vit_jax.sweep finds it.

The argument is a set (cifar10, cifar100, oxford_iiit_pet, oxford_flowers102, imagenet2012, folder), and, with commas
between them, how:

    short   500 steps, where the set has more
    cpu     500 steps of 128 images at 48 pixels and a rate of 0.03, for small models that were trained at 32
    probe   the head alone is trained, on a backbone that stays as it is
    adamw   AdamW with layer-wise decay of the rate and strong augmentation (arXiv 2111.06377, table 9)
"""

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.errors import UserError

# Steps of table 4, and a rate of the middle of those that it tries.
SETS = {
    "cifar10": (10_000, 0.01),
    "cifar100": (10_000, 0.01),
    "oxford_iiit_pet": (500, 0.01),
    "oxford_flowers102": (500, 0.01),
    "imagenet2012": (20_000, 0.03),
    "folder": (500, 0.01),
}
SHORT = 500


def get_config(argument: str = "") -> ConfigDict:
    """Fine-tuning on a set: `cifar10`, `cifar10,short`, `oxford_flowers102,adamw`, ..."""
    name, *words = [word.strip() for word in argument.split(",")]
    if name not in SETS or len(set(words)) < len(words) or not set(words) <= set(WAYS):
        raise UserError(
            f"configs/finetune.py:{argument}: no such argument\n"
            f"  allowed: a set ({', '.join(SETS)}),\n  and behind it, with commas: {', '.join(WAYS)}"
        )
    config = options.default()
    table_4(config, name)
    for word in WAYS:
        if word in words:
            WAYS[word](config)
    return config


def table_4(config: ConfigDict, name: str) -> None:
    """What the paper does: SGD with momentum, no weight decay, cosine, gradients clipped to 1, batches of 512."""
    steps, rate = SETS[name]
    config.model.variant = config.data.normalization = options.INIT_FROM
    config.checkpoint.update(init_head="new", every=500)
    config.data.update(name=name, image_size=384)
    # The published code's crops.
    config.augment.update(resized_crop=True, min_crop_area=0.05, flip=True)
    config.optimizer.update(name="sgd", learning_rate=rate, momentum=0.9, warmup_steps=500, gradient_clip=1.0)
    config.train.update(batch_size=512, steps=steps, evaluation_batch_size=256)
    if name == "imagenet2012":
        config.data.update(test="validation", decoded=False, workers=16)
        config.optimizer.average_decay = 0.9999
    if steps <= SHORT:
        short(config)


def short(config: ConfigDict) -> None:
    """500 steps: all warm-up, were it 500 too."""
    config.train.steps = min(config.train.steps, SHORT)
    config.optimizer.warmup_steps = 50


def cpu(config: ConfigDict) -> None:
    """What minutes of two cores allow: a model of configs/cifar10.py:cpu from 32 to 48 pixels."""
    short(config)
    config.data.image_size = 48
    config.augment.min_crop_area = 0.5
    # Of .003, .01, .03 and .1, by 1,000 images held out of CIFAR-10, from configs/pretrain.py:cifar100-cpu, 300 steps
    # at 32 pixels: 48.4, 51.4, 53.6 and 52.3 %.
    config.optimizer.learning_rate = 0.03
    config.train.update(batch_size=128, evaluation_batch_size=250)


def probe(config: ConfigDict) -> None:
    """A linear probe."""
    config.optimizer.trained = "head/*"


def adamw(config: ConfigDict) -> None:
    """The end-to-end fine-tuning of MAE, its rate for batches of 512 (1e-3 for 256)."""
    config.model.stochastic_depth = 0.1
    config.augment.update(min_crop_area=0.08, policy="rand_augment", policy_magnitude=9.0, policy_std=0.5)
    config.augment.update(erasing=0.25, erasing_mode="noise", mixup=0.8, cutmix=1.0, mix_per="batch")
    config.optimizer.update(name="adamw", learning_rate=2e-3, weight_decay=0.05, layer_decay=0.75, gradient_clip=None)
    config.train.label_smoothing = 0.1


WAYS = {"short": short, "cpu": cpu, "probe": probe, "adamw": adamw}
