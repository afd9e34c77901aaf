"""The paper's method from one end to the other, at the size of two cores: python benchmarks/chain.py [--scale=0.1].

A small model is pre-trained on CIFAR-100, with labels; it is fine-tuned on CIFAR-10 from there, and the same model is
trained on CIFAR-10 from scratch with as many steps, each with three seeds; and the features of the pre-trained and of a
fine-tuned model are judged by few-shot regression and nearest neighbours. Every part is the command that a user would
type (they are printed); the same call again goes on where it stopped.

Prints one JSON line: accuracies (mean, standard deviation and each seed's), the margin of fine-tuning, also in units of
the larger of the two standard deviations, the features' accuracies before and after, and the seconds of each part. The
curves: python docs/learning_curve.py WORKDIR/scratch WORKDIR/finetune curves.png
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
    parser.add_argument("--scale", type=float, default=1.0, help="length of every part; below 1, of the sets too")
    parser.add_argument("--workdir", default="runs/chain", help="where the runs go (default: %(default)s)")
    parser.add_argument("--data_dir", help="of TFDS; default: TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--source", default="cifar100", help="the set to pre-train on (default: %(default)s)")
    parser.add_argument("--target", default="cifar10", help="the set to fine-tune on (default: %(default)s)")
    return parser.parse_args(arguments)


def parts(flags: argparse.Namespace) -> dict[str, list[str]]:
    """The commands, by name, in order."""
    folder, scaled = Path(flags.workdir), lambda steps: max(1, round(steps * flags.scale))
    data = [f"--config.data.dir={flags.data_dir}"] if flags.data_dir else []
    small = flags.scale < 1
    # Short runs would spend most of their time on scoring.
    data += ["--config.data.test=test[:30%]"] * small
    short = [f"--config.train.steps={scaled(300)}", f"--config.optimizer.warmup_steps={scaled(50)}", *data]
    # The points of the curves cost more than the steps between them.
    short += [f"--config.train.evaluate_every={0 if small else 75}", f"--config.train.seeds={SEEDS}"]
    judge = [f"--data={flags.target}", "--methods=fewshot,knn"]
    judge += [f"--data_dir={flags.data_dir}"] if flags.data_dir else []
    judge += [f"--train=train[:{max(1, round(100 * flags.scale))}%]", "--test=test[:30%]"] * small
    main, transfer = ["vit_jax.main"], ["vit_jax.transfer", *judge]
    return {
        "pretrain": [
            *main,
            "--config=configs/pretrain.py:cifar100-cpu",
            f"--config.data.name={flags.source}",
            f"--config.train.steps={scaled(2000)}",
            f"--config.optimizer.warmup_steps={scaled(200)}",
            f"--workdir={folder / 'pretrain'}",
            *data,
        ],
        "scratch": [*main, f"--config=configs/{flags.target}.py:cpu", f"--workdir={folder / 'scratch'}", *short],
        "finetune": [
            *main,
            f"--config=configs/finetune.py:{flags.target},cpu",
            "--config.data.image_size=32",
            f"--config.checkpoint.init_from={folder / 'pretrain'}",
            f"--workdir={folder / 'finetune'}",
            *short,
        ],
        "before": [*transfer, f"--init={folder / 'pretrain'}", f"--out={folder / 'before'}"],
        "after": [*transfer, f"--init={folder / 'finetune' / 'seed-0'}", f"--out={folder / 'after'}"],
    }


def run(command: list[str]) -> float:
    """Seconds that a command takes."""
    print("python -m", *command, file=sys.stderr, flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def summary(folder: Path) -> dict[str, Any]:
    """Mean, spread and each seed's test accuracy of a run of several seeds, in percent."""
    content = json.loads((folder / "summary.json").read_text())
    named = {"mean": "test/accuracy", "std": "test/accuracy/std", "each": "test/accuracy/each"}
    percent = lambda value: [percent(one) for one in value] if isinstance(value, list) else round(100 * value, 2)  # noqa: E731
    return {name: percent(content[key]) for name, key in named.items()}


def judged(folder: Path) -> dict[str, float]:
    """The accuracies that a transfer evaluation found, in percent."""
    content = json.loads((folder / "transfer.json").read_text())
    return {name: round(100 * value, 2) for name, value in content.items() if name.endswith("/accuracy")}


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    flags.workdir = str(Path(flags.workdir).resolve())
    seconds = {name: round(run(command), 1) for name, command in parts(flags).items()}
    folder = Path(flags.workdir)
    scratch, finetuned = summary(folder / "scratch"), summary(folder / "finetune")
    margin, spread = finetuned["mean"] - scratch["mean"], max(finetuned["std"], scratch["std"])
    line = {
        "name": "chain",
        "scale": flags.scale,
        "scratch": scratch,
        "finetune": finetuned,
        "margin": round(margin, 2),
        "margin_by_spread": round(margin / spread, 1) if spread else None,
        "before": judged(folder / "before"),
        "after": judged(folder / "after"),
        "seconds": seconds,
        "seconds_in_all": round(sum(seconds.values())),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
