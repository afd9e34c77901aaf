"""The whole method of the paper, small enough for two CPU cores: python benchmarks/chain.py [--scale=0.1].

Pre-trains a small model on the labels of CIFAR-100; fine-tunes it on CIFAR-10, and trains the same model on CIFAR-10
from scratch for as many steps, each with three seeds; evaluates the features of the pre-trained and of a fine-tuned
model by few-shot regression and k-NN. Every part is a command that a user would type (they are printed); the same call
resumes where it stopped.

Prints one JSON line: accuracies (mean, standard deviation and each seed's), the gain of fine-tuning, also in units of
the larger of the two standard deviations, the accuracies of the features before and after, and the seconds of each
part. To plot the runs: python docs/learning_curve.py WORKDIR/scratch WORKDIR/finetune curves.png
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 3


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="scales the number of steps; below 1, the datasets too"
    )
    parser.add_argument("--workdir", default="runs/chain", help="directory of the runs (default: %(default)s)")
    parser.add_argument("--data_dir", help="directory of TFDS (default: TFDS_DATA_DIR or ~/tensorflow_datasets)")
    parser.add_argument("--source", default="cifar100", help="dataset to pre-train on (default: %(default)s)")
    parser.add_argument("--target", default="cifar10", help="dataset to fine-tune on (default: %(default)s)")
    return parser.parse_args(arguments)


def parts(flags: argparse.Namespace) -> dict[str, list[str]]:
    """The commands, by name, in order."""
    workdir = Path(flags.workdir)

    def scaled(steps: int) -> int:
        return max(1, round(steps * flags.scale))

    data = [f"--config.data.dir={flags.data_dir}"] if flags.data_dir else []
    small = flags.scale < 1
    # Short runs would spend most of their time on evaluation.
    data += ["--config.data.test=test[:30%]"] * small
    short = [f"--config.train.steps={scaled(300)}", f"--config.optimizer.warmup_steps={scaled(50)}", *data]
    # Evaluations cost more than the steps between them.
    short += [f"--config.train.evaluate_every={0 if small else 75}", f"--config.train.seeds={SEEDS}"]
    evaluation = [f"--data={flags.target}", "--methods=fewshot,knn"]
    evaluation += [f"--data_dir={flags.data_dir}"] if flags.data_dir else []
    evaluation += [f"--train=train[:{max(1, round(100 * flags.scale))}%]", "--test=test[:30%]"] * small
    main, transfer = ["vit_jax.main"], ["vit_jax.transfer", *evaluation]
    return {
        "pretrain": [
            *main,
            "--config=configs/pretrain.py:cifar100-cpu",
            f"--config.data.name={flags.source}",
            f"--config.train.steps={scaled(2000)}",
            f"--config.optimizer.warmup_steps={scaled(200)}",
            f"--workdir={workdir / 'pretrain'}",
            *data,
        ],
        "scratch": [*main, f"--config=configs/{flags.target}.py:cpu", f"--workdir={workdir / 'scratch'}", *short],
        "finetune": [
            *main,
            f"--config=configs/finetune.py:{flags.target},cpu",
            "--config.data.image_size=32",
            f"--config.checkpoint.init_from={workdir / 'pretrain'}",
            f"--workdir={workdir / 'finetune'}",
            *short,
        ],
        "before": [*transfer, f"--init={workdir / 'pretrain'}", f"--out={workdir / 'before'}"],
        "after": [*transfer, f"--init={workdir / 'finetune' / 'seed-0'}", f"--out={workdir / 'after'}"],
    }


def run(command: list[str]) -> float:
    """Runs a command; how many seconds it took."""
    print("python -m", *command, file=sys.stderr, flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def percent(value: Any) -> Any:
    """A share, or each of a list, in percent."""
    return [percent(one) for one in value] if isinstance(value, list) else round(100 * value, 2)


def summary(workdir: Path) -> dict[str, Any]:
    """Mean, standard deviation and each seed's test accuracy of a run with several seeds, in percent."""
    content = json.loads((workdir / "summary.json").read_text())
    keys = {"mean": "test/accuracy", "std": "test/accuracy/std", "each": "test/accuracy/each"}
    return {name: percent(content[key]) for name, key in keys.items()}


def feature_accuracies(workdir: Path) -> dict[str, float]:
    """The accuracies that a transfer evaluation found, in percent."""
    content = json.loads((workdir / "transfer.json").read_text())
    return {name: percent(value) for name, value in content.items() if name.endswith("/accuracy")}


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    flags.workdir = str(Path(flags.workdir).resolve())
    seconds = {name: round(run(command), 1) for name, command in parts(flags).items()}
    workdir = Path(flags.workdir)
    scratch, finetuned = summary(workdir / "scratch"), summary(workdir / "finetune")
    margin, spread = finetuned["mean"] - scratch["mean"], max(finetuned["std"], scratch["std"])
    line = {
        "name": "chain",
        "scale": flags.scale,
        "scratch": scratch,
        "finetune": finetuned,
        "margin": round(margin, 2),
        "margin_by_spread": round(margin / spread, 1) if spread else None,
        "before": feature_accuracies(workdir / "before"),
        "after": feature_accuracies(workdir / "after"),
        "seconds": seconds,
        "seconds_in_all": round(sum(seconds.values())),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
