"""The options of a config's sections `data` and `augment`, and what other sections share with them."""

from vit_jax.config.option import NAMES, STATISTICS, AnyOf, Option, When, changeable, free

MAX_SIDE = 2**14

CLASSIFY = When("train.objective", "classify")
FOLDER = When("data.name", "folder")
NOT_EMBEDDED = When("data.name", other_than=("digits",))
RAND_AUGMENT = When("augment.policy", "rand_augment")
GEOMETRIC_POLICY = When("augment.policy", "rand_augment", "trivial_augment", "auto_augment")
RESIZED_CROP = When("augment.resized_crop", True)
ERASING = When("augment.erasing", above=0)
MIXING = AnyOf(When("augment.mixup", above=0), When("augment.cutmix", above=0))

DATA = {
    "name": Option("digits", str, "Dataset: digits (built in), folder, arrays, or a TFDS name such as cifar10."),
    "labels": Option(
        ("label",),
        NAMES,
        "Kinds of label to train on, one head each; for example 'label,coarse_label'.",
        read_by=CLASSIFY,
    ),
    "features": Option(
        None,
        str,
        "Directory of stored features (vit-jax features) to train heads on. None: train on images.",
        read_by=CLASSIFY,
    ),
    "train": Option("train", str, "Training split in TFDS syntax, for example 'train' or 'train[:98%]'."),
    "validation": changeable(None, str, "Validation split, for example 'train[98%:]'. None: no validation."),
    "test": changeable(
        "test", str, "Test split. None: no test evaluation; the validation metrics are reported.", optional=True
    ),
    "image_size": Option(None, int, "Image height and width in pixels. None: as stored.", min=1, max=MAX_SIDE),
    "dir": free(
        None,
        str,
        "Data directory of folder, arrays or TFDS. None: TFDS_DATA_DIR or ~/tensorflow_datasets.",
        read_by=NOT_EMBEDDED,
    ),
    "skip_broken": Option(
        False,
        bool,
        "Skip image files that cannot be decoded, and report how many.",
        read_by=FOLDER,
    ),
    "held_out": Option(
        None,
        float,
        "Fraction of each class of train that becomes the split 'test' of a folder without one. None: 0.2 if a split "
        "of the config needs it, else none.",
        min=0.001,
        below=1,
        read_by=FOLDER,
    ),
    "cache_dir": free(None, str, "Directory where decoded datasets are cached. None: ~/.cache/vit_jax/data."),
    "decoded": free(
        True, bool, "Cache decoded images on disk. False: decode them every time they are read.", read_by=NOT_EMBEDDED
    ),
    "workers": free(4, int, "Threads that read data not resident on the device. 0: no read-ahead.", min=0, max=1024),
    "ahead": free(2, int, "Number of jitted calls whose data is read ahead.", min=1, max=1024),
    "worker_timeout": free(120.0, float, "Time limit for reading one image, in seconds.", min=0.001),
    "normalization": Option(
        "set",
        STATISTICS,
        "Pixel mean and std: of the training split (set), 0.5 (half), of ImageNet or CLIP, of init_from, or numbers.",
        words=("set", "half", "imagenet", "clip", "init_from"),
    ),
    "patches": Option(False, bool, "Feed normalized, flattened patches to the model instead of images."),
    "resident": free(
        "auto", str, "Keep the whole dataset in device memory. auto: if it fits.", choices=("auto", "always", "never")
    ),
}

AUGMENT = {
    "crop_padding": changeable(0, int, "Random crop after padding by this many pixels. 0: off.", min=0, max=MAX_SIDE),
    "crop_border": changeable(
        "black",
        str,
        "Content of the padding: black, or the reflected image.",
        choices=("black", "reflect"),
        read_by=When("augment.crop_padding", above=0),
    ),
    "resized_crop": changeable(False, bool, "Random crop of random area and aspect ratio, resized to the image size."),
    "min_crop_area": changeable(
        0.08,
        float,
        "Minimum crop area as a fraction of the image.",
        min=0.01,
        max=1,
        read_by=RESIZED_CROP,
        aliases=("crop_area_least",),
    ),
    "max_crop_area": changeable(
        1.0,
        float,
        "Maximum crop area as a fraction of the image.",
        min=0.01,
        max=1,
        read_by=RESIZED_CROP,
        aliases=("crop_area_most",),
    ),
    "crop_ratio": changeable(
        4 / 3, float, "Maximum aspect ratio of the crop, either way.", min=1, read_by=RESIZED_CROP
    ),
    "flip": changeable(False, bool, "Random horizontal flip with probability 0.5."),
    "rotation": changeable(0.0, float, "Maximum random rotation, in degrees either way.", min=0, max=180),
    "scaling": changeable(0.0, float, "Maximum random zoom in or out, as a fraction of the size.", min=0, below=1),
    "policy": changeable(
        "none",
        str,
        "Augmentation policy; see docs/data.md.",
        choices=("none", "rand_augment", "trivial_augment", "auto_augment", "three_augment"),
    ),
    "policy_operations": changeable(
        2, int, "RandAugment: number of operations per image (N).", min=1, max=100, read_by=RAND_AUGMENT
    ),
    "policy_magnitude": changeable(9.0, float, "RandAugment: magnitude (M).", min=0, max=10, read_by=RAND_AUGMENT),
    "policy_std": changeable(
        0.5, float, "RandAugment: standard deviation of the magnitude.", min=0, read_by=RAND_AUGMENT
    ),
    "policy_probability": changeable(
        0.5, float, "RandAugment: probability of applying each operation.", min=0, max=1, read_by=RAND_AUGMENT
    ),
    "fill": changeable(
        "mean",
        str,
        "Fill color for pixels from outside the image.",
        choices=("mean", "black", "grey"),
        read_by=AnyOf(GEOMETRIC_POLICY, RESIZED_CROP),
    ),
    "brightness": changeable(0.0, float, "Color jitter: brightness factor from 1 - x to 1 + x.", min=0),
    "contrast": changeable(0.0, float, "Color jitter: contrast factor from 1 - x to 1 + x.", min=0),
    "saturation": changeable(0.0, float, "Color jitter: saturation factor from 1 - x to 1 + x.", min=0),
    "hue": changeable(
        0.0, float, "Color jitter: maximum hue shift either way, as a fraction of the circle.", min=0, max=0.5
    ),
    "erasing": changeable(0.0, float, "Random erasing: probability per image.", min=0, max=1),
    "erasing_mode": changeable(
        "constant",
        str,
        "Fill of the erased rectangle: the mean (constant), or normal noise.",
        choices=("constant", "noise"),
        read_by=ERASING,
    ),
    "min_erasing_area": changeable(
        0.02,
        float,
        "Minimum erased area as a fraction of the image.",
        min=0,
        below=1,
        read_by=ERASING,
        aliases=("erasing_area_least",),
    ),
    "max_erasing_area": changeable(
        1 / 3,
        float,
        "Maximum erased area as a fraction of the image.",
        min=0,
        below=1,
        read_by=ERASING,
        aliases=("erasing_area_most",),
    ),
    "erasing_ratio": changeable(
        10 / 3, float, "Maximum aspect ratio of the erased rectangle, either way.", min=1, read_by=ERASING
    ),
    "mixup": changeable(0.0, float, "Mixup alpha: mixing weights are drawn from Beta(alpha, alpha). 0: off.", min=0),
    "cutmix": changeable(0.0, float, "CutMix alpha: area shares are drawn from Beta(alpha, alpha). 0: off.", min=0),
    "mix_probability": changeable(1.0, float, "Probability of applying mixup or CutMix.", min=0, max=1, read_by=MIXING),
    "mix_switch": changeable(
        0.5,
        float,
        "Probability of CutMix instead of mixup when both are on.",
        min=0,
        max=1,
        read_by=(When("augment.mixup", above=0), When("augment.cutmix", above=0)),
    ),
    "mix_per": changeable(
        "example", str, "Mixing weights per example or per batch.", choices=("example", "batch"), read_by=MIXING
    ),
    "repeats": changeable(
        1,
        int,
        "Repeated augmentation: copies of each example per batch. A pass over the data takes this many epochs.",
        min=1,
    ),
    "test_flip": changeable(
        False, bool, "Test-time augmentation: average over the image and its mirror image.", read_by=CLASSIFY
    ),
    "test_shift": changeable(
        0,
        int,
        "Test-time augmentation: average over the image and four shifts by this many pixels.",
        min=0,
        read_by=CLASSIFY,
    ),
}
