"""Nothing is left out without a word: links are followed, and what is left out is counted and named."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from vit_jax import config as options
from vit_jax import inference, predict, preview, sweep, transfer
from vit_jax.data import listing, sources
from vit_jax.errors import UserError
from vit_jax.training import lr_sweep

NFC, NFD = "caf\u00e9", "cafe\u0301"


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(image).save(path)


@pytest.fixture
def root(tmp_path):
    """Two classes in two splits, with two images each."""
    for seed, name in enumerate(f"{split}/{label}/{k}" for split in ("train", "test") for label in "ab" for k in "01"):
        draw(tmp_path / "set" / f"{name}.png", seed)
    return tmp_path / "set"


def load(root, split="train", **more):
    return sources.load("folder", split, data_dir=root, cache_dir=root.parent / "cache", image_size=8, **more)


def linked_folder(root):
    for k in range(3):
        draw(root.parent / "store" / f"{k}.png", 10 + k)
    (root / "train/a/more").symlink_to(root.parent / "store")
    return 7, None


def nested_links(root):
    linked_folder(root)
    draw(root.parent / "deeper/inner/9.png", 20)
    (root.parent / "store/next").symlink_to(root.parent / "deeper")
    return 8, None


def linked_class(root):
    linked_folder(root)
    shutil.rmtree(root / "train/a")
    (root / "train/a").symlink_to(root.parent / "store")
    return 5, None


def loop(root):
    (root / "train/a/loop").symlink_to(root / "train")
    (root / "train/a/self").symlink_to(root / "train/a")
    return 4, "left out: 2 link to a folder that is read anyway (train/a/loop, train/a/self)"


def linked_twice(root):
    linked_folder(root)
    (root / "train/a/again").symlink_to(root.parent / "store")
    return 7, "left out: 1 link to a folder that is read anyway (train/a/again)"


def broken_links(root):
    (root / "train/a/gone.png").symlink_to("/nowhere/gone.png")
    (root / "train/b/round.png").symlink_to(root / "train/b/round.png")
    (root / "train/c").symlink_to("/nowhere/c")
    return 4, "left out: 3 broken link (train/a/gone.png, train/b/round.png, train/c)"


def pipe(root):
    os.mkfifo(root / "train/a/pipe.png")
    return 4, "left out: 1 neither file nor folder (train/a/pipe.png)"


def unreadable(root):
    draw(root / "train/a/secret/1.png", 30)
    draw(root / "train/b/secret/2.png", 31)
    return 4, "left out: 2 unreadable folder (train/a/secret, train/b/secret)"


def hidden(root):
    draw(root / "train/a/.hidden.png", 30)
    draw(root / "train/.cache/1.png", 31)
    (root / "train/b/Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    return 4, "left out: 3 hidden (train/.cache, train/a/.hidden.png, train/b/Thumbs.db)"


def empty_classes(root):
    for name in ("bird", "cow"):
        (root / "train" / name).mkdir()
    return 4, "2 classes without images: bird, cow"


def one_name_in_two_forms(root):
    draw(root / "train" / NFC / "0.png", 40)
    draw(root / "train" / NFD / "1.png", 41)
    return 6, f"1 class in folders of two Unicode forms: {NFD}"


def names_in_two_cases(root):
    draw(root / "train/A/0.png", 40)
    return 5, "2 classes that differ only in case: A, a"


def loose_files(root):
    draw(root / "train/9.png", 50)
    draw(root / "10.png", 51)
    draw(root / "Valid/a/0.png", 52)
    return 4, "left out: 2 outside the splits (10.png, Valid), 1 outside the class folders (train/9.png)"


def file_names_with_control_characters(root):
    (root / "train/a/two\nlines\x1b[31m").symlink_to("/nowhere")
    return 4, r"left out: 1 broken link (train/a/two\nlines\x1b[31m)"


def of_other_systems(root):
    for name in ("__MACOSX/a", "@eaDir", "$RECYCLE.BIN", "a/@eaDir/0.png", "System Volume Information"):
        draw(root / "train" / name / "1.png", 50)
    return 4, ("left out: 5 hidden (train/$RECYCLE.BIN, train/@eaDir, train/System Volume Information and 2 more)")


def one_class_with_folders(root):
    shutil.rmtree(root / "train/b")
    for number, name in enumerate(("daisy", "rose")):
        draw(root / "train/a" / name / "0.png", 60 + number)
    shutil.rmtree(root / "test")
    return 4, (
        "all images are one class, a, although it has folders (daisy, rose); "
        "if these are classes, set config.data.dir to a"
    )


LEFT_OUT = (
    *(linked_folder, nested_links, linked_class, loop, linked_twice, broken_links, pipe, unreadable, hidden),
    *(empty_classes, one_name_in_two_forms, names_in_two_cases, loose_files, file_names_with_control_characters),
    *(of_other_systems, one_class_with_folders),
)


@pytest.fixture
def locked(monkeypatch):
    """Folders called 'secret' cannot be read; the tests may run as root, who may read everything."""
    scandir = os.scandir

    def refuse(path="."):
        if isinstance(path, str | os.PathLike) and os.path.basename(os.path.realpath(path)) == "secret":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.parametrize("change", LEFT_OUT, ids=[change.__name__ for change in LEFT_OUT])
def test_folders_are_read_completely_or_say_what_is_left_out(change, root, locked, capsys):
    count, note = change(root)
    for decoded in (True, True, False):  # decoded, from the cache, and read one by one
        source = load(root, decoded=decoded)
        printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("folder train: ")]
        assert printed == ([] if note is None else [f"folder train: {note}"])
        images = source.read(np.arange(len(source)))
        assert len({image.tobytes() for image in images}) == len(source) == count


def test_each_split_names_its_own(root, capsys):
    hidden(root)
    shutil.rmtree(root / "test/b")
    load(root)
    capsys.readouterr()
    load(root, "test")
    assert [line for line in capsys.readouterr().err.splitlines() if "folder t" in line and "decod" not in line] == [
        "folder test: 1 class without images: b"
    ]
    load(root, "train[:1]+test")
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("folder t")]) == 2


@pytest.mark.parametrize("forms", [(NFC, NFD), (NFD, NFC)], ids=["NFC in train", "NFD in train"])
def test_a_class_is_found_in_either_unicode_form(forms, root):
    for seed, (split, name) in enumerate(zip(("train", "test"), forms, strict=True)):
        draw(root / split / name / "0.png", 60 + seed)
    train, test = load(root), load(root, "test")
    assert train.class_names == test.class_names and unicodedata.normalize("NFC", train.class_names[2]) == NFC
    assert train.class_names[2] == forms[0] and (test.labels == 2).sum() == (train.labels == 2).sum() == 1


def case_differs(root):
    os.rename(root / "test/a", root / "test/A")


def unknown_class(root):
    draw(root / "test/wolf/0.png", 0)


def no_train(root):
    os.rename(root / "train", root / "valid")


def capital_splits(root):
    os.rename(root / "train", root / "Train")
    os.rename(root / "test", root / "Test")


def unreadable_split(root):
    shutil.rmtree(root / "test")
    draw(root.parent / "secret/a/0.png", 0)
    (root / "test").symlink_to(root.parent / "secret")


def all_links_broken(root):
    shutil.rmtree(root)
    for name in ("a/0.png", "b/1.png"):
        (root / name).parent.mkdir(parents=True)
        (root / name).symlink_to("/nowhere")


def splits_beside_others(root):
    capital_splits(root)
    draw(root / "Meta/0.png", 0)


def splits_of_one_name(root):
    for split in ("train", "test"):
        os.rename(root / split, root / f"seg_{split}")
    draw(root / "seg_pred/0.png", 0)


def splits_in_a_folder(root):
    for split in ("train", "test"):
        shutil.move(root / split, root / "flowers" / split)


def splits_in_classes(root):
    for label in "ab":
        for split in ("train", "val"):
            draw(root / "train" / label / split / "0.png", 0)


def a_split_beside_classes(root):
    for label in "ab":
        os.rename(root / "train" / label, root / label)
    os.rmdir(root / "train")


def trailing_space(root):
    os.rename(root / "test/a", root / "test/a ")


def class_called_train(root):
    shutil.rmtree(root)
    for label in ("bus", "train"):
        draw(root / label / "0.png", 0)


def nothing(root):
    shutil.rmtree(root)
    root.mkdir()


@pytest.mark.parametrize(
    "change, words",
    [
        (case_differs, ["test/A", "class that train does not have", "'a'"]),
        (unknown_class, ["test/wolf", "class that train does not have"]),
        (no_train, ["splits without 'train'", "test, valid", "rename"]),
        (capital_splits, ["splits without 'train'", "Test, Train"]),
        (all_links_broken, ["no files", "2 broken link (a/0.png, b/1.png)"]),
        (unreadable_split, ["set/test cannot be read: Permission denied"]),
        (nothing, ["no subdirectories"]),
        (splits_beside_others, ["splits without 'train'", "Meta, Test, Train", "rename"]),
        (splits_of_one_name, ["splits without 'train'", "seg_pred, seg_test, seg_train", "rename"]),
        (splits_in_a_folder, ["set/flowers, the folder of a class, contains splits: test, train"]),
        (splits_in_classes, ["set/train/a, the folder of a class, contains splits: train, val"]),
        (a_split_beside_classes, ["set/test is a split beside classes", "called train"]),
        (trailing_space, ["test/a ", "it has 'a'"]),
        (class_called_train, ["no subdirectories", "for a class called train: train/train"]),
    ],
    ids=["another case", "unknown", "no train", "capitals", "broken links", "unreadable", "empty"]
    + ["others", "one name", "in a folder", "in classes", "beside classes", "space", "called train"],
)
def test_folders_that_are_no_dataset_are_refused(change, words, root, locked):
    change(root)
    with pytest.raises(UserError) as caught:
        load(root)
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) <= 3


def test_predict_follows_links_and_names_what_is_no_image(root, capsys):
    linked_folder(root)
    hidden(root)
    (root / "train/a/notes.txt").write_text("no image")
    images = list(inference.expand([root / "train"]))
    assert len(images) == 7 and images == sorted(images)
    assert capsys.readouterr().err == (
        f"{root}/train: left out: 3 hidden (.cache, a/.hidden.png, b/Thumbs.db), "
        "1 without the extension of an image (a/notes.txt)\n"
    )
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train/notes.txt").write_text("no image")
    assert predict.main([f"--workdir={root}", str(root / "train")]) == 2
    error = capsys.readouterr().err
    assert "no images found" in error and "notes.txt" in error and len(error.splitlines()) == 3


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        (sweep, ["--rates=.1", "--config.train.seeds=2"], ["config.train.seeds is 2", "one seed"]),
        (sweep, ["--rates=.1", "--config.train.seeds=0,3"], ["config.train.seeds"]),
        (sweep, ["--rates=.1", "--config.optimizer.learning_rate=.2"], ["--rates"]),
        (transfer, ["--features=x", "--image_size=8"], ["--image_size is only used with --init"]),
        (transfer, ["--features=x", "--pooling=mean"], ["--pooling"]),
        (transfer, ["--features=x", "--test=test[:9]"], ["--test"]),
        (transfer, ["--init=x", "--methods=knn", "--shots=3"], ["--shots is only used with --methods=fewshot"]),
        (transfer, ["--init=x", "--methods=fewshot", "--held_out=.3"], ["--held_out"]),
        (sweep, ["--rates=.1", "--held_out=5", "--config.data.validation=train[90%:]"], ["--held_out=5 is not used"]),
        (
            transfer,
            ["--init=x.npz", "--data=digits", "--data_dir=/data"],
            ["no data directory is used", "given: /data; omit it"],
        ),
    ],
)
def test_options_that_nothing_reads_are_refused(command, arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vit_jax.training.train.train", lambda *_: pytest.fail("something was trained"))
    monkeypatch.setattr("vit_jax.runtime.compilation_cache.cache_compilations", lambda: None)
    first = ["--config=configs/digits.py", f"--workdir={tmp_path / 'new'}"] if command is sweep else []
    assert command.main([*first, *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and len(error.splitlines()) <= 3
    assert not (tmp_path / "new").exists()


def test_a_sweep_of_several_seeds_is_refused_by_its_plan():
    config = options.load("configs/digits.py")
    config.train.seeds = 2
    with pytest.raises(UserError, match=r"config\.train\.seeds is 2"):
        lr_sweep.plan(config, (0.1,), 10.0)


def test_arrays_name_unused_files_and_classes_without_examples(tmp_path, capsys):
    images, labels = np.zeros((4, 2, 2, 3), np.uint8), np.array([1, 2, 1, 4])
    np.savez(tmp_path / "train.npz", images=images, labels=labels)
    np.save(tmp_path / "extra.npy", labels)
    (tmp_path / "._train.npz").write_bytes(b"of a Macintosh")
    for _ in range(2):
        assert len(sources.load("arrays", "train", data_dir=tmp_path, cache_dir=tmp_path / "cache")) == 4
        printed = capsys.readouterr().err
        assert "arrays train: left out: 2 outside the splits (._train.npz, extra.npy); 2 of 5 classes" in printed
        assert "without examples: 0, 3\n" in printed
    np.save(tmp_path / "train_images.npy", images)
    np.save(tmp_path / "train_labels.npy", labels)
    with pytest.raises(UserError, match="the split train twice"):
        sources.load("arrays", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    "seeds, seed, words", [("3,5", 3, " of seed 3,"), ("2", 7, " of seed 7,"), ("None", 7, "step 0,")]
)
def test_preview_draws_the_first_of_several_seeds(seeds, seed, words, tmp_path, capsys, monkeypatch):
    drawn = []

    def batch(config, step):
        drawn.append(config.train.seed)
        return np.zeros((4, 8, 8, 1), np.uint8), np.eye(4, 10), tuple("0123456789"), 2

    monkeypatch.setattr(preview, "batch", batch)
    arguments = [f"--config.train.seeds={seeds}"] + ([] if seeds == "3,5" else ["--config.train.seed=7"])
    assert preview.main(["--config=configs/digits.py", f"--out={tmp_path / 'a.png'}", "--count=2", *arguments]) == 0
    assert drawn == [seed] and words in capsys.readouterr().out


def test_many_names_are_counted():
    left_out = listing.LeftOut(listing.Path("/data"))
    for number in range(9):
        left_out.add("broken link", f"/data/a/{number}")
    assert left_out.describe() == "left out: 9 broken link (a/0, a/1, a/2 and 6 more)"
