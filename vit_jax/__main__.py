"""The command `vit-jax NAME ...`, which is also `python -m vit_jax NAME ...`: one name for each command."""

import importlib
import sys

from vit_jax import __version__, terminal
from vit_jax.errors import UserError, nearest

# Name, module, and what it does in one line. The module has a function `main(arguments)` that returns an exit status.
COMMANDS = {
    "train": ("vit_jax.main", "train a model from a config, or resume a run"),
    "finetune": ("vit_jax.finetune", "fine-tune a published or trained model on a dataset or a directory of images"),
    "evaluate": ("vit_jax.evaluate", "score a run or a published model on every example of a split"),
    "predict": ("vit_jax.predict", "classify images"),
    "report": ("vit_jax.report", "write a run, or a comparison of runs, as one HTML page"),
    "sweep": ("vit_jax.sweep", "find the learning rate"),
    "transfer": ("vit_jax.transfer", "few-shot, k-NN and linear probe on frozen features"),
    "features": ("vit_jax.features", "compute and store the features of a split or of images without labels"),
    "look": ("vit_jax.look", "draw what a model learned: attention, features, filters, positions"),
    "reconstruct": ("vit_jax.reconstruct", "draw the reconstructions of a masked autoencoder"),
    "preview": ("vit_jax.preview", "draw the augmented images of a training step"),
    "prepare": ("vit_jax.data.prepare", "prepare CIFAR-10 or CIFAR-100 for training"),
    "convert": ("vit_jax.convert", "convert weights of and for other projects"),
    "summary": ("vit_jax.summary", "list the layers of a model, its parameters and FLOPs"),
    "checkpoints": ("vit_jax.checkpoints", "list, verify, compare and average the checkpoints of a run"),
}
# What other programs call these commands, where the spelling is not similar.
SYNONYMS = {
    "evaluate": ("test", "val", "validate", "score"),
    "features": ("extract", "embed"),
    "finetune": ("tune",),
    "predict": ("classify", "infer", "inference"),
    "look": ("attention", "visualize", "show", "rollout"),
    "preview": ("augment", "samples"),
    "summary": ("info", "model"),
    "sweep": ("lr", "search", "tune-lr"),
    "train": ("fit", "main", "run", "resume", "pretrain"),
    "transfer": ("probe", "knn", "fewshot"),
}


def help_text() -> str:
    """Returns the text of --help: every command in one line."""
    program = terminal.program() or terminal.SCRIPT
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "Vision Transformers in JAX and Flax.",
            "",
            f"  {program} train --config=digits",
            f"  {program} predict --workdir=runs/digits IMAGE",
            "",
            "commands:",
            *(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()),
            "",
            f"{program} COMMAND --help describes a command; {program} --version shows the version.",
        ]
    )


def unknown(name: str) -> UserError:
    """Returns the error for an unknown command, with the one that may be meant."""
    if name.startswith("-"):
        return UserError(f"the command is missing before {name}\n  for example: vit-jax train {name}")
    near = nearest(name, COMMANDS) or [one for one, words in SYNONYMS.items() if name.lower() in words]
    hint = f"nearest: {near[0]}" if near else f"allowed: {', '.join(COMMANDS)}"
    return UserError(f"there is no command {name[:100]!r}\n  {hint}\n  see vit-jax --help")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit status.

    Args:
        arguments: by default those of the process.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    return terminal.finish(lambda: _without_command(name))


def _without_command(name: str) -> None:
    if name == "--version":
        terminal.output(f"vit_jax {__version__}")
    elif name in ("-h", "--help", "help"):
        terminal.output(help_text())
    else:
        raise unknown(name)


if __name__ == "__main__":
    sys.exit(main())
