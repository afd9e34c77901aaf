"""Transfer evaluation: what the command reports is what slow, independent arithmetic gives for the same features."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config as options
from vit_jax import features as features_command
from vit_jax import transfer, weights
from vit_jax.data import feature_store, sources
from vit_jax.evaluation import exact, fewshot
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import build_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sets():
    return {role: sources.load("digits", role) for role in ("train", "test")}


@pytest.fixture(scope="module")
def by_hand(digits_run, sets):
    """The features of both splits, by the model and a mean and std computed here."""
    from orbax.checkpoint import v1 as ocp

    parameters = ocp.load_checkpointables(digits_run / "checkpoints" / "0")["state"]["parameters"]
    config = options.from_dict(json.loads((digits_run / "config.json").read_text()))
    model = build_model.build(config.model, classes=10, dtype=np.float32).clone(classes=None)
    pixels = sets["train"].images / 255
    mean, std = pixels.mean(), pixels.std()
    inputs = {role: ((source.images / 255 - mean) / std).astype(np.float32) for role, source in sets.items()}
    made = {role: np.asarray(jax.jit(model.apply)({"params": parameters}, one)) for role, one in inputs.items()}
    return made, parameters["head"]["label"]["pre_logits"]


@pytest.fixture(scope="module")
def measured(digits_run, tmp_path_factory):
    """Everything, once: what the file says, and the folder that it is in."""
    out = tmp_path_factory.mktemp("out")
    arguments = [f"--init={digits_run}", f"--out={out}", "--draws=3", "--neighbours=1,20", "--probe_l2=1e-4,1e-2,1"]
    assert transfer.main(arguments) == 0
    return json.loads((out / "transfer.json").read_text()), out


def test_the_features_are_what_the_head_reads(measured, by_hand, sets):
    for role, source in sets.items():
        made = feature_store.read(measured[1] / "features" / f"{role}.npz")
        np.testing.assert_allclose(made.features, by_hand[0][role], atol=1e-5)
        np.testing.assert_array_equal(made.labels["label"], source.labels)


def test_few_shots_are_least_squares_by_numpy(measured, by_hand, sets):
    found, (made, _) = measured[0], by_hand
    for shots in (1, 5, 10):
        accuracies = []
        for number in range(3):
            places = fewshot.draw(sets["train"].labels, 10, shots, 0, number)
            train, labels = made["train"][places].astype("d"), sets["train"].labels[places]
            mean, std = train.mean(0), train.std(0) + 1e-5
            inputs, targets = (train - mean) / std, 2.0 * np.eye(10)[labels] - 1
            gram = inputs.T @ inputs + 16 * 4 / 3 * np.eye(16)
            kernel = np.linalg.inv(gram) @ inputs.T @ (targets - targets.mean(0))
            logits = (made["test"] - mean) / std @ kernel + targets.mean(0)
            accuracies.append((logits.argmax(1) == sets["test"].labels).mean())
        # One test digit of 360 may fall on the other side.
        np.testing.assert_allclose(found[f"fewshot/{shots}/draws"], accuracies, atol=1.01 / 360)
        draws = found[f"fewshot/{shots}/draws"]
        assert found[f"fewshot/{shots}/accuracy"] == pytest.approx(np.mean(draws))
        assert found[f"fewshot/{shots}/std"] == pytest.approx(np.std(draws, ddof=1))
    assert found["fewshot/l2"] == pytest.approx(16 * 4 / 3)
    assert found["fewshot/10/accuracy"] > found["fewshot/1/accuracy"] > 0.2


def test_neighbours_and_probe_are_scikit_learns(measured, by_hand, sets):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    found, (made, _) = measured[0], by_hand
    labels, truth = sets["train"].labels, sets["test"].labels
    for count in (1, 20):
        theirs = KNeighborsClassifier(count, metric="cosine", algorithm="brute").fit(made["train"], labels)
        wanted = theirs.score(made["test"], truth)
        assert found[f"knn/{count}/majority_accuracy"] == pytest.approx(wanted, abs=1.01 / 360)
    assert found["knn/1/accuracy"] == found["knn/1/majority_accuracy"]
    weighted = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(made["train"], labels)
    assert found["knn/20/accuracy"] == pytest.approx(weighted.score(made["test"], truth), abs=1.01 / 360)
    mean, std = made["train"].mean(0), made["train"].std(0) + 1e-5
    fitted = LogisticRegression(C=1 / (found["probe/l2"] * len(labels)), tol=1e-7, max_iter=10_000)
    fitted.fit((made["train"] - mean) / std, labels)
    wanted = fitted.score((made["test"] - mean) / std, truth)
    assert found["probe/accuracy"] == pytest.approx(wanted, abs=2.01 / 360)
    grid = {row["l2"]: row["validation_accuracy"] for row in found["probe/grid"]}
    assert sorted(grid) == [1e-4, 1e-2, 1] and grid[found["probe/l2"]] == max(grid.values())
    assert (found["train/examples"], found["test/examples"], found["width"], found["classes"]) == (1437, 360, 16, 10)


def test_features_are_computed_once(measured, digits_run, tmp_path, monkeypatch, capsys):
    before, out = measured[0], tmp_path / "copy"
    shutil.copytree(measured[1], out)
    compute = exact.extract
    monkeypatch.setattr(exact, "extract", lambda *_: pytest.fail("computed again"))
    arguments = [f"--init={digits_run}", f"--out={out}", "--draws=3", "--methods=fewshot"]
    assert transfer.main([*arguments, "--shots=1,5"]) == 0
    captured = capsys.readouterr()
    after = json.loads((out / "transfer.json").read_text())
    assert after["fewshot/5/draws"] == before["fewshot/5/draws"]
    value, std = (f"{100 * after[f'fewshot/5/{name}']:.2f}" for name in ("accuracy", "std"))
    assert f"few-shot, 5 a class   {value} %  +- {std}, 3 draws" in captured.out and "those in" in captured.err
    assert f"written: {out / 'transfer.json'}" in captured.out
    # Others than those that lie there are not taken for them.
    calls = []
    monkeypatch.setattr(exact, "extract", lambda *rest: (calls.append(1), compute(*rest))[1])
    assert transfer.main([*arguments, "--shots=1", "--normalize=half"]) == 0
    assert len(calls) == 2


def test_another_seed_draws_others(measured, digits_run, tmp_path):
    found = {}
    for seed in (0, 1):
        arguments = ["--methods=fewshot", "--shots=1", "--draws=1", f"--seed={seed}"]
        assert transfer.main([f"--features={measured[1] / 'features'}", f"--out={tmp_path}", *arguments]) == 0
        found[seed] = json.loads((tmp_path / "transfer.json").read_text())
    assert found[0]["fewshot/1/draws"] == measured[0]["fewshot/1/draws"][:1] != found[1]["fewshot/1/draws"]
    assert found[0]["fewshot/1/std"] is None


@pytest.mark.slow
def test_behind_the_layer_before_the_logits(digits_run, by_hand, sets, tmp_path):
    from sklearn.neighbors import KNeighborsClassifier

    made, layer = by_hand
    behind = {role: np.tanh(one @ layer["kernel"] + layer["bias"]) for role, one in made.items()}
    theirs = KNeighborsClassifier(5, metric="cosine", algorithm="brute").fit(behind["train"], sets["train"].labels)
    arguments = [f"--init={digits_run}", f"--out={tmp_path}", "--methods=knn", "--neighbours=5", "--pre_logits"]
    assert transfer.main(arguments) == 0
    found = json.loads((tmp_path / "transfer.json").read_text())
    wanted = theirs.score(behind["test"], sets["test"].labels)
    assert found["width"] == 8 and found["knn/5/majority_accuracy"] == pytest.approx(wanted, abs=1.01 / 360)


@pytest.mark.slow
def test_stored_features_of_the_other_command(digits_run, measured, tmp_path):
    for role in ("train", "test"):
        assert features_command.main([f"--workdir={digits_run}", f"--split={role}", f"--out={tmp_path / role}"]) == 0
    assert transfer.main([f"--features={tmp_path}", "--methods=knn", "--label=parity", "--neighbours=3"]) == 0
    assert json.loads((tmp_path / "transfer.json").read_text())["classes"] == 2
    assert transfer.main([f"--features={tmp_path}", "--methods=knn"]) == 0
    found = json.loads((tmp_path / "transfer.json").read_text())
    assert found["knn/20/accuracy"] == measured[0]["knn/20/accuracy"]


@pytest.fixture(scope="module")
def colour_file(tmp_path_factory):
    """A small model for images of three channels, 12 pixels, in a file of weights."""
    model = VisionTransformer(classes=3, patch_size=4, width=12, depth=1, heads=2, mlp_width=12)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 12, 12, 3), np.float32))["params"]
    generator = np.random.default_rng(0)
    parameters = jax.tree.map(lambda leaf: generator.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("file") / "model.npz"
    weights.save(path, model, parameters)
    return path, model, parameters


@pytest.mark.slow
def test_a_file_of_others_on_images_as_it_knows_them(colour_file, tmp_path):
    """Images are resized to what its positions are for; its kernel is summed for grey ones; mean and std are 0.5."""
    path, model, parameters = colour_file
    arguments = [f"--init={path}", "--data=digits", "--test=test[:50]", "--pooling=mean"]
    assert transfer.main([*arguments, "--methods=knn", f"--out={tmp_path}"]) == 0
    images = sources.load("digits", "test[:50]", image_size=12).images.astype(np.float32).repeat(3, axis=3)
    tokens = model.clone(classes=None, pooling="none").apply({"params": parameters}, jnp.asarray(images / 127.5 - 1))
    made = feature_store.read(tmp_path / "features" / "test.npz")
    np.testing.assert_allclose(made.features, np.asarray(tokens)[:, 1:].mean(1), atol=1e-4)
    found = json.loads((tmp_path / "transfer.json").read_text())
    assert found["image_size"] == [12, 12] and found["normalize"] == "half"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--init=RUN", "--shots=200"], "--shots=200: class "),
        (["--init=RUN", "--train=train[:5]", "--shots=1"], "has 0 training examples"),
        (["--init=RUN", "--train=train[:15]", "--methods=knn"], "--neighbours=20: there are 15 training examples"),
        (["--init=RUN", "--train=train[:15]", "--methods=probe"], "leaves no example to choose"),
        (["--init=RUN", "--shots=0"], "--shots=0\n  allowed: whole numbers of at least 1"),
        (["--init=RUN", "--shots=1,x"], "--shots=1,x"),
        (["--init=RUN", "--draws=0"], "--draws is 0"),
        (["--init=RUN", "--methods=knn,magic"], "allowed: fewshot, knn, probe"),
        (["--init=RUN", "--data=digitz"], "Nearest known names"),
        (["--init=RUN", "--label=colour"], "it has: label, parity"),
        (["--init=RUN", "--step=3"], "has no checkpoint of step 3; there are: 0"),
        (["--init=RUN", "--step=newest"], "allowed: a whole number, or best"),
        (["--init=RUN", "--normalize=data"], "allowed: set, half, imagenet"),
        (["--init=RUN", "--normalize=imagenet"], "is 'imagenet', and the images have 1 channels"),
        (["--init=RUN", "--image_size=10"], "a patch of 4 does not divide an image of 10x10"),
        (["--init=FILE"], "--data is missing"),
        (["--init=FILE", "--data=digits", "--pre_logits"], "has no such layer"),
        (["--init=FILE.not", "--data=digits"], "there is no such file"),
        (["--features=EMPTY"], "has no features of the train split"),
    ],
)
def test_what_is_wrong_is_said(arguments, said, digits_run, colour_file, tmp_path, capsys):
    names = {"RUN": digits_run, "FILE": colour_file[0], "EMPTY": tmp_path}
    typed = []
    for argument in arguments:
        for name, path in names.items():
            argument = argument.replace(name, str(path))
        typed.append(argument)
    assert transfer.main([*typed, f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and len(error.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(digits_run, tmp_path):
    command = [sys.executable, "-m", "vit_jax.transfer", f"--init={digits_run}", f"--out={tmp_path}", "--draws=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "linear probe" in done.stdout and json.loads((tmp_path / "transfer.json").read_text())["seed"] == 0
