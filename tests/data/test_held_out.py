"""The split `test` of a folder without one: stratified, a function of the file names, the same for every command."""

import collections
import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from vit_jax import commands
from vit_jax import config as options
from vit_jax.data import held_out, sources
from vit_jax.errors import UserError
from vit_jax.training import folder_config, lr_sweep, setup

COUNTS = {"cat": 10, "dog": 7, "owl": 2, "yak": 1}


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    """Class folders without splits; every image is different."""
    for label, (name, count) in enumerate(COUNTS.items()):
        for k in range(count):
            write(tmp_path / "set" / name / f"{k}.png", 100 * label + k)
    return tmp_path / "set"


def load(root, split, **more):
    more = {"held_out": 0.2, "image_size": 8, "cache_dir": root.parent / "cache"} | more
    return sources.load("folder", split, data_dir=root, **more)


def images(source):
    pixels = source.read(np.arange(len(source)))
    return {image.tobytes(): label for image, label in zip(pixels, source.labels.tolist(), strict=True)}


def files(*counts):
    """Files of classes 0, 1, ... in the order of the hash of their names."""
    named = [(f"class{label}/{k}.jpg", label) for label, count in enumerate(counts) for k in range(count)]
    return sorted(named, key=lambda file: hashlib.sha256(file[0].encode()).digest())


@pytest.mark.parametrize("decoded", [True, False])
def test_a_fifth_of_each_class_is_held_out_and_no_image_is_in_both_splits(root, decoded):
    train, test = (images(load(root, split, decoded=decoded)) for split in ("train", "test"))
    assert collections.Counter(test.values()) == {0: 2, 1: 1, 2: 1}  # round(0.2 n), at least one of two, none of one
    assert collections.Counter(train.values()) == {0: 8, 1: 6, 2: 1, 3: 1}
    assert not train.keys() & test.keys()
    assert train | test == images(load(root, "train", held_out=None, decoded=decoded))
    assert train | test == images(load(root, "all", decoded=decoded))


def test_statistics_are_those_of_the_remaining_images_alone(root):
    source = load(root, "test")
    pixels = load(root, "train").images.reshape(-1, 3) / 255
    np.testing.assert_allclose(source.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(source.std, pixels.std(0), rtol=1e-12)


def test_slices_select_from_the_remaining_images(root):
    parts = [images(load(root, split)) for split in ("train[:75%]", "train[75%:]")]
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == images(load(root, "train"))


def test_the_line_says_the_rule_and_the_number_per_class(root, capsys):
    load(root, "test")
    line = next(line for line in capsys.readouterr().err.splitlines() if "held out" in line)
    for words in ("20 % of each class", "hash of the file names", "cat 2 of 10", "owl 1 of 2", "yak 0 of 1"):
        assert words in line


def test_the_split_of_a_class_depends_on_its_own_names_alone():
    kept, tested = held_out.divide(files(30, 9), 0.2)
    shuffled = held_out.divide(files(30, 9, 50), 0.2)  # a further class
    assert [file for file in shuffled[1] if file[1] < 2] == tested
    assert [file for file in shuffled[0] if file[1] < 2] == kept
    for label, count in enumerate((30, 9)):  # the slow obvious version
        names = [f"class{label}/{k}.jpg" for k in range(count)]
        first = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[: round(0.2 * count)]
        assert {name for name, of in tested if of == label} == {*first}


def test_adding_a_photo_moves_at_most_one_other():
    for count in range(2, 40):
        before, after = ({*held_out.divide(files(n), 0.2)[1]} for n in (count, count + 1))
        added = (f"class0/{count}.jpg", 0)
        assert len((before ^ after) - {added}) <= 1


def test_broken_files_are_left_out_before_the_split_is_made(root):
    expected = images(load(root, "all"))
    for name in ("owl/broken.jpg", "yak/broken.jpg"):
        (root / name).write_bytes(b"no image")
    train, test = (images(load(root, split, skip_broken=True)) for split in ("train", "test"))
    assert train | test == expected and collections.Counter(test.values())[3] == 0


def test_a_stored_test_split_is_used_as_it_is(root):
    for k in range(3):
        write(root.parent / "stored/train/cat" / f"{k}.png", k)
    write(root.parent / "stored/test/cat/0.png", 9)
    assert [len(load(root.parent / "stored", split)) for split in ("train", "test")] == [3, 1]


def test_nothing_can_be_held_out_of_classes_with_one_image(tmp_path):
    for seed, name in enumerate(("a/0.png", "b/0.png")):
        write(tmp_path / "set" / name, seed)
    with pytest.raises(UserError, match=r"no class of .*set has two images(.|\n)*at least two per class"):
        load(tmp_path / "set", "test")


def test_an_image_in_the_folders_of_two_classes_is_named(root, capsys):
    write(root / "dog" / "twice.png", 1000)
    write(root / "cat" / "twice.png", 1000)
    load(root, "train")
    assert "cat/twice.png and dog/twice.png" in capsys.readouterr().err


# --- configs ---


def config_of(root, **data):
    config = options.default()
    config.data.update(name="folder", dir=str(root), image_size=8)
    config.data.update(data)
    config.train.steps = 2
    return config


@pytest.mark.parametrize(
    "data, expected",
    [
        ({}, 0.2),
        ({"train": "train[:75%]", "validation": "train[75%:]"}, 0.2),
        ({"held_out": 0.5}, 0.5),
        ({"train": "train[:80%]", "test": "train[80%:]"}, None),  # as a run of an earlier version
        ({"test": None, "validation": "train[80%:]"}, None),
    ],
)
def test_a_config_that_needs_a_test_split_holds_one_out(root, data, expected):
    config = config_of(root, **data)
    folder_config.complete_config(config)
    assert config.data.held_out == expected
    setup.check(config)


def test_a_stored_validation_split_stands_in_for_a_test_split(root, tmp_path, capsys):
    for split in ("train", "val"):
        write(tmp_path / "split" / split / "cat" / "0.png", 0)
    config = config_of(tmp_path / "split")
    folder_config.complete_config(config)
    assert (config.data.test, config.data.held_out) == ("val", None)
    assert "its folder val is the test split" in capsys.readouterr().err


def test_a_run_keeps_the_split_that_it_began_with(root, tmp_path, monkeypatch):
    """Also if the folder would now be divided in another way, or has a test split."""
    begun = config_of(root, held_out=0.3).to_dict()
    monkeypatch.setattr(folder_config.run_directory, "has_begun", lambda _: True)
    monkeypatch.setattr(folder_config.run_files, "read_config", lambda _: begun)
    config = config_of(root)
    folder_config.complete_config(config, tmp_path)
    assert config.data.held_out == 0.3
    begun["data"].pop("held_out")  # of an earlier version
    config = config_of(root)
    folder_config.complete_config(config, tmp_path)
    assert config.data.held_out is None


def test_the_trials_of_a_sweep_never_see_the_held_out_images(root):
    config = config_of(root)
    config.optimizer.warmup_steps = 0
    folder_config.complete_config(config)
    trial = lr_sweep.plan(config, (0.1,), 25).trial(0.1)
    trial.data.cache_dir = str(root.parent / "cache")
    seen = [images(source) for source in setup.load_sources(trial).values()]
    assert seen[0] | seen[1] == images(load(root, "train"))


def test_a_missing_split_ends_with_the_flags_to_type(tmp_path):
    np.savez(tmp_path / "train.npz", images=np.zeros((10, 8, 8, 3), np.uint8), labels=np.arange(10) % 2)
    config = options.default()
    config.data.update(name="arrays", dir=str(tmp_path))
    with pytest.raises(UserError) as caught:
        setup.check(config)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    flags = lines[-1].replace("'", "").split()[-2:]
    assert flags == ["--config.data.train=train[:80%]", "--config.data.test=train[80%:]"]
    for flag in flags:
        options.override(config, flag.removeprefix("--config."))
    setup.check(config)


def test_the_message_on_a_missing_image_size_proposes_one_from_the_pictures(root):
    config = config_of(root, image_size=None)
    with pytest.raises(UserError, match=r"median size of its images is 8x8\n.*--config\.data\.image_size=16"):
        setup.check(config)


# --- configs/photos.py ---


def photos(root, *overrides):
    return commands.make_config("configs/photos.py", [f"data.dir={root}", *overrides])


def test_photos_needs_only_a_directory(root):
    config = photos(root)
    assert config.data.held_out == 0.2 and config.data.skip_broken and config.data.image_size == 32
    assert (config.train.steps, config.train.epochs) == (300, None)
    setup.check(config)
    with pytest.raises(UserError, match=r"--config\.data\.dir=PHOTOS"):
        commands.make_config("configs/photos.py", [])


def test_the_command_line_wins_over_what_photos_adapts(root):
    config = photos(root, "train.steps=8", "data.image_size=16", "optimizer.learning_rate=0.5", "model.depth=1")
    chosen = config.train.steps, config.data.image_size, config.optimizer.learning_rate, config.model.depth
    assert chosen == (8, 16, 0.5, 1)
    assert config.train.evaluate_every == 2
    assert photos(root, "train.epochs=3").train.steps is None


@pytest.mark.slow
def test_photos_is_fine_tuned_at_the_image_size_of_the_model(root, make_run):
    """Whatever the recipe sets for training from scratch: the model is that of the run, with a new head."""
    run = make_run()
    config = photos(root, f"checkpoint.init_from={run}")
    begun = options.from_dict(json.loads((run / "config.json").read_text()))
    for key in ("width", "depth", "heads", "mlp_width", "pooling", "position"):
        assert config.model[key] == begun.model[key]
    assert config.data.image_size == json.loads((run / "data.json").read_text())["image_shape"][0]
    assert config.checkpoint.init_head == "new" and config.train.steps == 200
    assert photos(root, f"checkpoint.init_from={run}", "data.image_size=24").data.image_size == 24
