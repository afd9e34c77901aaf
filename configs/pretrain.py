"""Pre-training: supervised as in arXiv 2010.11929, table 3, or self-supervised by masking patches.

    vit-jax train --config=pretrain:imagenet
    vit-jax train --config=pretrain:imagenet21k --config.data.dir=IMAGES
    vit-jax train --config=pretrain:folder --config.data.dir=PHOTOS
    vit-jax train --config=pretrain:cifar100
    vit-jax train --config=pretrain:cifar100-cpu
    vit-jax train --config=pretrain:mae
    vit-jax train --config=pretrain:mae-cpu
    vit-jax train --config=pretrain:masked-patches
    vit-jax train --config=pretrain:masked-patches-cpu

`imagenet`, `imagenet21k` and `folder` are for many accelerators; `cifar100`, `mae` and `masked-patches` for one; those
that end in `-cpu` for two CPU cores. With a smaller batch, lower the learning rate in proportion, or keep the batch and
accumulate gradients: --config.train.accumulation.

Measured, on two CPU cores (AMD EPYC with AVX-512; jax 0.10.2, float32): `cifar100-cpu`, 9:07 of training, test accuracy
30.82 % on CIFAR-100 at the last step (seed 0). docs/finetuning.md has the results of fine-tuning it on CIFAR-10.
"""

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.errors import UserError


def get_config(recipe: str = "imagenet") -> ConfigDict:
    """The config of a recipe, by name."""
    if recipe not in RECIPES:
        raise UserError(f"configs/pretrain.py:{recipe}: unknown argument\n  allowed: {ARGUMENTS}")
    config = options.default()
    RECIPES[recipe](config)
    return config


def paper(config: ConfigDict) -> None:
    """The common options of table 3, for B/16: a tanh layer before the head, which fine-tuning drops."""
    config.model.update(variant="B/16", pre_logits="width", dropout=0.1)
    config.data.image_size = 224
    # The crop of the published code: at least 5 % of the area, resized to the image size.
    config.augment.update(resized_crop=True, min_crop_area=0.05, flip=True)
    config.optimizer.update(name="adamw", warmup_steps=10_000, gradient_clip=1.0)
    config.train.update(batch_size=4096, evaluate_every=5000, evaluation_batch_size=1024)
    config.checkpoint.every = 5000


def imagenet(config: ConfigDict) -> None:
    """The row "ViT-*, ImageNet": 1 % of train is held out for validation; the official validation split is the test."""
    paper(config)
    config.data.update(name="imagenet2012", train="train[:99%]", validation="train[99%:]", test="validation")
    config.optimizer.update(learning_rate=3e-3, schedule="cosine", weight_decay=0.3)
    config.train.epochs = 300


def imagenet21k(config: ConfigDict) -> None:
    """The row "ViT-B, ImageNet-21k", from a directory with a subdirectory per class.

    An image may show several of the 21,843 classes, of which it is labelled with one. As in the published code, the
    loss is therefore a sigmoid cross-entropy per class, and the initial bias of -10 predicts that no class is present.
    """
    paper(config)
    config.model.head_bias = -10.0
    config.data.update(name="folder", train="train[50000:]", test="train[:50000]")
    config.optimizer.update(learning_rate=1e-3, schedule="linear", weight_decay=0.03)
    config.train.update(epochs=90, loss="sigmoid")


def folder(config: ConfigDict) -> None:
    """The ImageNet row for about 100,000 images of your own: S/16, with a quarter of batch, learning rate and warmup.

    The directory holds train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg, of which 20 % are held out to test on.
    """
    paper(config)
    config.model.variant = "S/16"
    config.data.update(name="folder", train="train[:98%]", validation="train[98%:]")
    config.optimizer.update(learning_rate=7.5e-4, schedule="cosine", weight_decay=0.3, warmup_steps=2500)
    config.train.update(batch_size=1024, epochs=300, evaluate_every=1000)
    config.checkpoint.every = 1000


def cifar100(config: ConfigDict) -> None:
    """The ImageNet row at 32 pixels: a batch of 512, so an eighth of the learning rate, and ten epochs of warmup."""
    config.model.update(variant="Ti/4", pre_logits="width", dropout=0.1)
    config.data.update(name="cifar100", train="train[:98%]", validation="train[98%:]")
    config.augment.update(crop_padding=4, crop_border="reflect", flip=True)
    config.optimizer.update(learning_rate=3.75e-4, warmup_steps=1000, weight_decay=0.3, gradient_clip=1.0)
    config.train.update(batch_size=512, epochs=300, evaluate_every=1000)
    config.checkpoint.every = 1000


def cifar100_cpu(config: ConfigDict) -> None:
    """The model of configs/cifar10.py:cpu, which can be fine-tuned from it; 2,000 steps."""
    small(config)
    config.data.update(name="cifar100", train="train[:98%]", validation="train[98%:]")
    config.augment.update(crop_padding=2, flip=True)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=200, weight_decay=0.05, gradient_clip=1.0)
    config.train.update(steps=2000)


def small(config: ConfigDict) -> None:
    """The common options of the recipes for two CPU cores."""
    config.model.update(variant="Ti/4", width=128, depth=4, heads=2, mlp_width=256, pooling="mean")
    config.model.position = "sincos_2d"
    config.train.update(batch_size=128, evaluate_every=500, evaluation_batch_size=250)
    config.checkpoint.every = 500


def without_labels(config: ConfigDict) -> None:
    """CIFAR-10 images; the model of configs/cifar10.py, with fixed position embeddings."""
    config.model.update(variant="Ti/4", depth=9, heads=12, mlp_width=384, position="sincos_2d")
    config.data.update(name="cifar10", train="train[:98%]", validation="train[98%:]")
    # Masking needs no augmentation other than crops and flips (arXiv 2111.06377, section 4.1).
    config.augment.update(resized_crop=True, min_crop_area=0.2, flip=True)
    config.train.update(batch_size=512, epochs=800, evaluate_every=5000)
    config.checkpoint.every = 5000


def mae(config: ConfigDict) -> None:
    """A masked autoencoder: 48 of 64 patches masked, two decoder blocks, 800 epochs (half of the paper's 1,600)."""
    without_labels(config)
    config.train.objective = "masked_autoencoder"
    config.decoder.update(width=96, depth=2, heads=3, mlp_width=384)
    # The learning rate (1.5e-4 for 256 images) and betas of the paper.
    config.optimizer.update(learning_rate=3e-4, beta2=0.95, weight_decay=0.05, warmup_steps=3800)


def mae_cpu(config: ConfigDict) -> None:
    """`mae` for the model of configs/cifar10.py:cpu: 4,000 steps."""
    without_labels(config)
    small(config)
    config.train.update(objective="masked_autoencoder", epochs=None, steps=4000)
    config.decoder.update(width=64, depth=1, heads=2, mlp_width=128)
    config.optimizer.update(learning_rate=1e-3, beta2=0.95, weight_decay=0.05, warmup_steps=200)


def masked_patches(config: ConfigDict) -> None:
    """Adam with 2e-4 and a cosine schedule as in appendix B.1.2, with 32 of 64 patches masked."""
    without_labels(config)
    config.train.objective = "masked_patches"
    config.optimizer.update(name="adam", learning_rate=2e-4, warmup_steps=3800)


def masked_patches_cpu(config: ConfigDict) -> None:
    """`masked_patches` for the model of configs/cifar10.py:cpu: 2,000 steps, with a higher learning rate."""
    without_labels(config)
    small(config)
    config.train.update(objective="masked_patches", epochs=None, steps=2000)
    config.optimizer.update(name="adam", learning_rate=1e-3, warmup_steps=200)


RECIPES = {
    "imagenet": imagenet,
    "imagenet21k": imagenet21k,
    "folder": folder,
    "cifar100": cifar100,
    "cifar100-cpu": cifar100_cpu,
    "mae": mae,
    "mae-cpu": mae_cpu,
    "masked-patches": masked_patches,
    "masked-patches-cpu": masked_patches_cpu,
}
ARGUMENTS = f"a recipe: {', '.join(RECIPES)}"
