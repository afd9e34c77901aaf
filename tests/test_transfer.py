"""Transfer evaluation: the command's results agree with NumPy and scikit-learn on the same features."""

import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import run_command

import vit_jax
from vit_jax import config as options
from vit_jax import features as features_command
from vit_jax import transfer, weights
from vit_jax.data import feature_store, sources
from vit_jax.evaluation import extraction, fewshot
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import build_model


@pytest.fixture(scope="module")
def sets():
    return {role: sources.load("digits", role) for role in ("train", "test")}


@pytest.fixture(scope="module")
def expected(digits_run, sets):
    """Returns the features of both splits, and the layer before the logits; images are normalized here."""
    from orbax.checkpoint import v1 as ocp

    parameters = ocp.load_checkpointables(digits_run / "checkpoints" / "0")["state"]["parameters"]
    config = options.from_dict(json.loads((digits_run / "config.json").read_text()))
    model = build_model.build(config.model, classes=10, dtype=np.float32).clone(classes=None)
    pixels = sets["train"].images / 255
    mean, std = pixels.mean(), pixels.std()
    inputs = {role: ((source.images / 255 - mean) / std).astype(np.float32) for role, source in sets.items()}
    apply = jax.jit(model.apply)
    features = {role: np.asarray(apply({"params": parameters}, images)) for role, images in inputs.items()}
    return features, parameters["head"]["label"]["pre_logits"]


@pytest.fixture(scope="module")
def measured(digits_run, tmp_path_factory):
    """Runs all methods once; returns the content of transfer.json, and its directory."""
    out = tmp_path_factory.mktemp("out")
    arguments = [f"--init={digits_run}", f"--out={out}", "--draws=3", "--neighbours=1,20", "--probe_l2=1e-4,1e-2,1"]
    assert transfer.main(arguments) == 0
    return json.loads((out / "transfer.json").read_text()), out


@pytest.mark.slow
def test_features_are_the_input_of_the_head(measured, expected, sets):
    for role, source in sets.items():
        stored = feature_store.read(measured[1] / "features" / f"{role}.npz")
        np.testing.assert_allclose(stored.features, expected[0][role], atol=1e-5)
        np.testing.assert_array_equal(stored.labels["label"], source.labels)


@pytest.mark.slow
def test_fewshot_agrees_with_numpy(measured, expected, sets):
    results, (features, _) = measured[0], expected
    for shots in (1, 5, 10):
        accuracies = []
        for draw_index in range(3):
            indices = fewshot.draw(sets["train"].labels, 10, shots, 0, draw_index)
            train, labels = features["train"][indices].astype("d"), sets["train"].labels[indices]
            mean, std = train.mean(0), train.std(0) + 1e-5
            inputs, targets = (train - mean) / std, 2.0 * np.eye(10)[labels] - 1
            gram = inputs.T @ inputs + 16 * 4 / 3 * np.eye(16)
            kernel = np.linalg.inv(gram) @ inputs.T @ (targets - targets.mean(0))
            logits = (features["test"] - mean) / std @ kernel + targets.mean(0)
            accuracies.append((logits.argmax(1) == sets["test"].labels).mean())
        # The tolerance is one of the 360 test digits.
        np.testing.assert_allclose(results[f"fewshot/{shots}/draws"], accuracies, atol=1.01 / 360)
        draws = results[f"fewshot/{shots}/draws"]
        assert results[f"fewshot/{shots}/accuracy"] == pytest.approx(np.mean(draws))
        assert results[f"fewshot/{shots}/std"] == pytest.approx(np.std(draws, ddof=1))
    assert results["fewshot/l2"] == pytest.approx(16 * 4 / 3)
    assert results["fewshot/10/accuracy"] > results["fewshot/1/accuracy"] > 0.2


@pytest.mark.slow
def test_knn_and_probe_agree_with_scikit_learn(measured, expected, sets):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    results, (features, _) = measured[0], expected
    labels, truth = sets["train"].labels, sets["test"].labels
    for count in (1, 20):
        theirs = KNeighborsClassifier(count, metric="cosine", algorithm="brute").fit(features["train"], labels)
        accuracy = theirs.score(features["test"], truth)
        assert results[f"knn/{count}/majority_accuracy"] == pytest.approx(accuracy, abs=1.01 / 360)
    assert results["knn/1/accuracy"] == results["knn/1/majority_accuracy"]
    weighted = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(features["train"], labels)
    assert results["knn/20/accuracy"] == pytest.approx(weighted.score(features["test"], truth), abs=1.01 / 360)
    mean, std = features["train"].mean(0), features["train"].std(0) + 1e-5
    model = LogisticRegression(C=1 / (results["probe/l2"] * len(labels)), tol=1e-7, max_iter=10_000)
    model.fit((features["train"] - mean) / std, labels)
    accuracy = model.score((features["test"] - mean) / std, truth)
    assert results["probe/accuracy"] == pytest.approx(accuracy, abs=2.01 / 360)
    grid = {row["l2"]: row["validation_accuracy"] for row in results["probe/grid"]}
    assert sorted(grid) == [1e-4, 1e-2, 1] and grid[results["probe/l2"]] == max(grid.values())
    sizes = [results[name] for name in ("train/examples", "test/examples", "width", "classes")]
    assert sizes == [1437, 360, 16, 10]


@pytest.mark.slow
def test_features_are_computed_once(measured, digits_run, tmp_path, monkeypatch, capsys):
    before, out = measured[0], tmp_path / "copy"
    shutil.copytree(measured[1], out)
    extract = extraction.extract
    monkeypatch.setattr(extraction, "extract", lambda *_: pytest.fail("computed again"))
    arguments = [f"--init={digits_run}", f"--out={out}", "--draws=3", "--methods=fewshot"]
    assert transfer.main([*arguments, "--shots=1,5"]) == 0
    captured = capsys.readouterr()
    after = json.loads((out / "transfer.json").read_text())
    assert after["fewshot/5/draws"] == before["fewshot/5/draws"]
    value, std = (f"{100 * after[f'fewshot/5/{name}']:.2f}" for name in ("accuracy", "std"))
    assert f"few-shot, 5 per class   {value} %  +- {std} over 3 draws" in captured.out
    assert f"results: {out / 'transfer.json'}" in captured.out and "reading" in captured.err
    # Features that differ from the stored ones are computed.
    calls = []
    monkeypatch.setattr(extraction, "extract", lambda *rest: (calls.append(1), extract(*rest))[1])
    assert transfer.main([*arguments, "--shots=1", "--normalize=half"]) == 0
    assert len(calls) == 2


@pytest.mark.slow
def test_the_seed_determines_the_draws(measured, tmp_path):
    results = {}
    for seed in (0, 1):
        arguments = ["--methods=fewshot", "--shots=1", "--draws=1", f"--seed={seed}"]
        assert transfer.main([f"--features={measured[1] / 'features'}", f"--out={tmp_path}", *arguments]) == 0
        results[seed] = json.loads((tmp_path / "transfer.json").read_text())
    assert results[0]["fewshot/1/draws"] == measured[0]["fewshot/1/draws"][:1] != results[1]["fewshot/1/draws"]
    assert results[0]["fewshot/1/std"] is None


@pytest.mark.slow
def test_features_after_the_layer_before_the_logits(digits_run, expected, sets, tmp_path):
    from sklearn.neighbors import KNeighborsClassifier

    features, layer = expected
    outputs = {role: np.tanh(inputs @ layer["kernel"] + layer["bias"]) for role, inputs in features.items()}
    theirs = KNeighborsClassifier(5, metric="cosine", algorithm="brute").fit(outputs["train"], sets["train"].labels)
    arguments = [f"--init={digits_run}", f"--out={tmp_path}", "--methods=knn", "--neighbours=5", "--pre_logits"]
    assert transfer.main(arguments) == 0
    results = json.loads((tmp_path / "transfer.json").read_text())
    accuracy = theirs.score(outputs["test"], sets["test"].labels)
    assert results["width"] == 8 and results["knn/5/majority_accuracy"] == pytest.approx(accuracy, abs=1.01 / 360)


@pytest.mark.slow
def test_features_written_by_the_features_command(digits_run, measured, tmp_path):
    for role in ("train", "test"):
        assert features_command.main([f"--workdir={digits_run}", f"--split={role}", f"--out={tmp_path / role}"]) == 0
    assert transfer.main([f"--features={tmp_path}", "--methods=knn", "--label=parity", "--neighbours=3"]) == 0
    assert json.loads((tmp_path / "transfer.json").read_text())["classes"] == 2
    assert transfer.main([f"--features={tmp_path}", "--methods=knn"]) == 0
    results = json.loads((tmp_path / "transfer.json").read_text())
    assert results["knn/20/accuracy"] == measured[0]["knn/20/accuracy"]


@pytest.fixture(scope="module")
def colour_file(tmp_path_factory):
    """Returns a weights file of a small model for 12x12 RGB images, the model and its parameters."""
    model = VisionTransformer(classes=3, patch_size=4, width=12, depth=1, heads=2, mlp_width=12)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 12, 12, 3), np.float32))["params"]
    generator = np.random.default_rng(0)
    parameters = jax.tree.map(lambda leaf: generator.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("file") / "model.npz"
    weights.save(path, model, parameters)
    return path, model, parameters


@pytest.mark.slow
def test_images_are_converted_to_those_of_a_weights_file(colour_file, tmp_path):
    """Images are resized to the size of its positions, its kernel is summed over channels, mean and std are 0.5."""
    path, model, parameters = colour_file
    arguments = [f"--init={path}", "--data=digits", "--test=test[:50]", "--pooling=mean"]
    assert transfer.main([*arguments, "--methods=knn", f"--out={tmp_path}"]) == 0
    images = sources.load("digits", "test[:50]", image_size=12).images.astype(np.float32).repeat(3, axis=3)
    tokens = model.clone(classes=None, pooling="none").apply({"params": parameters}, jnp.asarray(images / 127.5 - 1))
    stored = feature_store.read(tmp_path / "features" / "test.npz")
    np.testing.assert_allclose(stored.features, np.asarray(tokens)[:, 1:].mean(1), atol=1e-4)
    results = json.loads((tmp_path / "transfer.json").read_text())
    assert results["image_size"] == [12, 12] and results["normalize"] == "half"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init=RUN", "--shots=200"], "--shots=200: class "),
        (["--init=RUN", "--train=train[:5]", "--shots=1"], "has 0 training examples"),
        (["--init=RUN", "--train=train[:15]", "--methods=knn"], "--neighbours=20: there are 15 training examples"),
        (["--init=RUN", "--train=train[:15]", "--methods=probe"], "is less than one example"),
        (["--init=RUN", "--shots=0"], "--shots is '0'\n  allowed: integers of at least 1"),
        (["--init=RUN", "--shots=1,x"], "--shots is '1,x'"),
        (["--init=RUN", "--draws=0"], "--draws is 0"),
        (["--init=RUN", "--methods=knn,magic"], "allowed: fewshot, knn, probe"),
        (["--init=RUN", "--data=digitz"], "digitz"),
        (["--init=RUN", "--label=colour"], "label, parity"),
        (["--init=RUN", "--step=3"], "step 3"),
        (["--init=RUN", "--step=newest"], "allowed: an integer, or best"),
        (["--init=RUN", "--normalize=data"], "allowed: set, half, imagenet"),
        (["--init=RUN", "--normalize=imagenet"], "--normalize is 'imagenet'"),
        (["--init=RUN", "--image_size=10"], "10x10"),
        (["--init=FILE"], "--data is missing"),
        (["--init=FILE", "--data=digits", "--pre_logits"], "has no layer before its logits"),
        (["--init=FILE.not", "--data=digits"], "model.npz.not"),
        (["--features=EMPTY"], "features of the train split"),
    ],
)
def test_mistakes_are_reported(arguments, message, digits_run, colour_file, tmp_path, capsys):
    names = {"RUN": digits_run, "FILE": colour_file[0], "EMPTY": tmp_path}
    typed = []
    for argument in arguments:
        for name, path in names.items():
            argument = argument.replace(name, str(path))
        typed.append(argument)
    assert transfer.main([*typed, f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_runs_in_a_process(digits_run, tmp_path):
    arguments = [f"--init={digits_run}", f"--out={tmp_path}", "--draws=2"]
    assert "linear probe" in run_command("vit_jax.transfer", *arguments, stderr=subprocess.PIPE)
    assert json.loads((tmp_path / "transfer.json").read_text())["seed"] == 0


@pytest.mark.slow
def test_what_is_assumed_of_a_backbone_is_said_once(tmp_path, capsys):
    """A DINOv2 file without JSON is normalized by ImageNet's mean and std, here of images with three channels."""
    path = Path(__file__).parent / "weights" / "references" / "hf_dinov2_registers"
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        images = rng.integers(0, 256, (12, 12, 12, 3), np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(12) % 2)
    arguments = [f"--init={path}", "--data=arrays", f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert transfer.main([*arguments, "--methods=knn", "--neighbours=1"]) == 0
    assert capsys.readouterr().err.count("are not recorded; assumed: imagenet") == 1
    about = feature_store.read(tmp_path / "out" / "features" / "test.npz").about
    assert about["normalized_by"] == [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]


@pytest.mark.slow
def test_images_are_prepared_as_the_file_records_it(tmp_path, monkeypatch):
    """As by `vit_jax.backbone`: resized and cropped, to a size that is smaller than that of the positions."""
    folder = tmp_path / "weights"
    shutil.copytree(Path(__file__).parent / "weights" / "references" / "hf_dinov2_registers", folder)
    recorded = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "size": {"shortest_edge": 11}, "crop_size": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(recorded))
    pictures = np.random.default_rng(1).integers(0, 256, (6, 20, 31, 3), np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=pictures, labels=np.arange(6) % 2)
    monkeypatch.chdir(tmp_path)
    assert transfer.main([f"--init={folder}", "--data=arrays", "--data_dir=.", "--methods=knn", "--neighbours=1"]) == 0
    out = Path("runs/transfer/weights/arrays")  # a directory of weights is left as it is
    found = feature_store.read(out / "features" / "test.npz").features
    np.testing.assert_allclose(found, vit_jax.backbone(folder)(pictures)["pooled"], rtol=0, atol=1e-5)
    about = json.loads((out / "transfer.json").read_text())
    assert about["image_size"] == [8, 8] and about["preparation"]["crop_pct"] == pytest.approx(8 / 11)
