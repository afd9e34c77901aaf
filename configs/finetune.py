"""Fine-tuning as in arXiv 2010.11929, table 4: a pre-trained model with a new head of zeros, on images of 384 pixels.

    vit-jax train --config=finetune:cifar10 --config.checkpoint.init_from=augreg-b16-in21k
    vit-jax train --config=finetune:folder --config.data.dir=PHOTOS \
        --config.checkpoint.init_from=augreg-b16-in21k
    vit-jax train --config=finetune:cifar100,cpu --config.checkpoint.init_from=runs/cifar10-cpu

All but `cpu` are for an accelerator; only `cifar10,cpu` has been measured, at 32 pixels (docs/finetuning.md). The model
is that of init_from: a run directory, a file that docs/weights.md lists, or the name of a published model, which is
downloaded (augreg-b16-in21k: about 410 MB; vit-jax convert --list prints the names). The best learning rate
depends on the dataset: vit-jax sweep finds it.

The argument is a dataset (cifar10, cifar100, oxford_iiit_pet, oxford_flowers102, imagenet2012, folder), and after it,
separated by commas, any of:

    short   at most 500 steps
    cpu     500 steps of 128 images of 48 pixels with a learning rate of 0.03, for small models trained at 32 pixels
    probe   linear probe: only the head is trained, the backbone is frozen
    adamw   AdamW with layer-wise learning-rate decay and strong augmentation (arXiv 2111.06377, table 9)
"""

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.errors import UserError

# Steps of table 4, and a learning rate from the middle of the range that it tries.
DATASETS = {
    "cifar10": (10_000, 0.01),
    "cifar100": (10_000, 0.01),
    "oxford_iiit_pet": (500, 0.01),
    "oxford_flowers102": (500, 0.01),
    "imagenet2012": (20_000, 0.03),
    "folder": (500, 0.01),
}
SHORT = 500


def get_config(argument: str = "") -> ConfigDict:
    """The config for a dataset and variants: `cifar10`, `cifar10,short`, `oxford_flowers102,adamw`, ..."""
    name, *words = [word.strip() for word in argument.split(",")]
    if name not in DATASETS or len(set(words)) < len(words) or not set(words) <= set(VARIANTS):
        raise UserError(f"configs/finetune.py:{argument}: unknown argument\n  allowed: {ARGUMENTS}")
    config = options.default()
    table_4(config, name)
    for word in VARIANTS:
        if word in words:
            VARIANTS[word](config)
    return config


def table_4(config: ConfigDict, name: str) -> None:
    """The paper's recipe: SGD with momentum, no weight decay, cosine schedule, gradient norm clipped at 1."""
    steps, learning_rate = DATASETS[name]
    config.model.variant = config.data.normalization = options.INIT_FROM
    config.checkpoint.update(init_head="new", every=500)
    config.data.update(name=name, image_size=384)
    # The crops of the published code.
    config.augment.update(resized_crop=True, min_crop_area=0.05, flip=True)
    config.optimizer.update(name="sgd", learning_rate=learning_rate, momentum=0.9, warmup_steps=500, gradient_clip=1.0)
    config.train.update(batch_size=512, steps=steps, evaluation_batch_size=256)
    if name == "imagenet2012":
        config.data.update(test="validation", decoded=False, workers=16)
        config.optimizer.average_decay = 0.9999
    if steps <= SHORT:
        short(config)


def short(config: ConfigDict) -> None:
    """At most 500 steps, with 50 of warmup instead of 500."""
    config.train.steps = min(config.train.steps, SHORT)
    config.optimizer.warmup_steps = 50


def cpu(config: ConfigDict) -> None:
    """Minutes on two CPU cores: fine-tunes a model of configs/cifar10.py:cpu, trained at 32 pixels, at 48."""
    short(config)
    config.data.image_size = 48
    config.augment.min_crop_area = 0.5
    # Chosen on 1,000 held-out training images of CIFAR-10, from configs/pretrain.py:cifar100-cpu, 300 steps at 32
    # pixels: 0.003, 0.01, 0.03 and 0.1 reach 48.4, 51.4, 53.6 and 52.3 %.
    config.optimizer.learning_rate = 0.03
    config.train.update(batch_size=128, evaluation_batch_size=250)


def probe(config: ConfigDict) -> None:
    """Linear probe: only the head is trained."""
    config.optimizer.trained = "head/*"


def adamw(config: ConfigDict) -> None:
    """End-to-end fine-tuning as in MAE, with its learning rate scaled to batches of 512 (1e-3 for 256)."""
    config.model.stochastic_depth = 0.1
    config.augment.update(min_crop_area=0.08, policy="rand_augment", policy_magnitude=9.0, policy_std=0.5)
    config.augment.update(erasing=0.25, erasing_mode="noise", mixup=0.8, cutmix=1.0, mix_per="batch")
    config.optimizer.update(name="adamw", learning_rate=2e-3, weight_decay=0.05, layer_decay=0.75, gradient_clip=None)
    config.train.label_smoothing = 0.1


VARIANTS = {"short": short, "cpu": cpu, "probe": probe, "adamw": adamw}
ARGUMENTS = f"a dataset ({', '.join(DATASETS)}),\n  and after it, separated by commas: {', '.join(VARIANTS)}"
