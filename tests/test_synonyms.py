"""Unknown options lead to the one that is meant: misspelled, in another section, or named as in other libraries."""

import copy
import re

import pytest

from vit_jax import config as options
from vit_jax import main
from vit_jax.config import synonyms
from vit_jax.config.load import ALIASES, option
from vit_jax.errors import UserError

# What people type, by the option that they mean; also with sections of other libraries, and with dashes.
MEANT = {
    "optimizer.learning_rate": "lr optimizer.lr train.lr optim.lr trainer.optimizer.lr base_lr optimizer.learnig_rate "
    "learning-rate train.learning_rate LR config.lr",
    "optimizer.weight_decay": "wd optimizer.wd weight-decay train.weight_decay optimizer.weightdecay",
    "optimizer.warmup_steps": "warmup warmup_epochs warmup-steps train.warmup_steps num_warmup_steps optimizer.warmup",
    "optimizer.schedule": "sched lr_scheduler_type train.scheduler",
    "optimizer.final_learning_rate": "min_lr optimizer.min-lr eta_min",
    "optimizer.gradient_clip": "grad_clip clip_grad max_grad_norm train.gradient_clip_val optimizer.grad_clip_norm",
    "optimizer.average_decay": "ema model_ema ema_decay train.ema",
    "optimizer.name": "opt optim optimizer optim.name optimizer.nmae",
    "train.batch_size": "bs batch batch-size batch_size data.batch_size per_device_train_batch_size train.bs",
    "train.epochs": "epochs num_epochs max_epochs num_train_epochs trainer.max_epochs train.epoch",
    "train.steps": "steps max_steps total_steps trian.steps train.stpes iters",
    "train.accumulation": "grad_accum gradient_accumulation_steps accumulate_grad_batches",
    "train.seed": "seed random_state data.seed",
    "train.evaluate_every": "eval_steps val_check_interval",
    "train.label_smoothing": "smoothing label-smoothing loss.label_smoothing",
    "model.dtype": "amp precision fp16 bf16 mixed_precision train.dtype",
    "model.stochastic_depth": "drop_path model.drop_path_rate",
    "model.variant": "patch patch_size model.patch_size model.name model.type arch model model.varient",
    "model.width": "hidden_size dim embed_dim model.embed_dim wdith model.width_",
    "model.depth": "num_layers layers model.num_hidden_layers model.dpeth",
    "model.heads": "num_heads n_head model.num-attention-heads",
    "model.mlp_width": "mlp_ratio mlp_dim intermediate_size",
    "data.image_size": "img_size resolution input_size model.img_size model.image_size",
    "data.name": "dataset dataset_name data.dataset",
    "data.dir": "data_path data_dir data.root data-dir",
    "data.workers": "num_workers workers loader.num_workers",
    "augment.policy": "aa auto_augment randaug",
    "augment.flip": "hflip data.flip",
    "augment.erasing": "reprob",
    "checkpoint.init_from": "pretrained checkpoint ckpt model.pretrained finetune",
    "checkpoint.every": "save_every save_steps checkpoint.save_interval",
    "mesh.devices": "gpus devices num_gpus trainer.devices",
    "log.every": "log_every logging_steps logging.every",
}
# What is no option, and a part of what is said.
INSTEAD = {
    "wandb log.wandb report_to trainer.logger": "for a tracker: config.log.tracker=wandb, mlflow or trackio",
    "early_stopping train.early_stopping patience": "best validation result is kept: see config.checkpoint.keep_best",
    "output_dir out save-dir log.log_dir": "--workdir=DIR",
    "resume train.resume resume_from_checkpoint": "run the same command again",
    "num_classes model.num_classes": "omit it",
}
# Names that resemble an option by chance; its suggestion would mislead.
NOTHING = "qwerty foo.bar train.foo model.foo xyzzy nms anchors vocab_size tokenizer beam_size interpolation gamma"


UNCHANGED = options.default()


def message(name: str) -> str:
    with pytest.raises(UserError) as caught:
        options.override(UNCHANGED, f"{name}=1")
    assert str(caught.value).count("\n") <= 2
    return str(caught.value)


@pytest.mark.parametrize("meant", MEANT)
def test_the_option_that_is_meant_is_named(meant):
    for name in MEANT[meant].split():
        assert f"\n  nearest: config.{meant}: {option(meant).doc}" in message(name), name


@pytest.mark.parametrize("names", INSTEAD)
def test_what_exists_in_place_of_an_option_is_said(names):
    for name in names.split():
        assert INSTEAD[names] in message(name) and "nearest" not in message(name), name


def test_nothing_is_suggested_where_nothing_is_near():
    for name in NOTHING.split():
        assert "\n  allowed: " in message(name), name


def test_the_tables_name_options_that_exist_and_hide_none():
    keys = {key for section in options.OPTIONS.values() for key in section} | ALIASES.keys()
    for table in (synonyms.SYNONYMS, synonyms.RELATED):
        assert set(table) <= set(options.names())
        words = " ".join(table.values()).split()
        assert len(words) == len(set(words)) and not (keys | {*options.names()}) & set(words)
    same, related, notes = (
        set(" ".join(words).split())
        for words in (synonyms.SYNONYMS.values(), synonyms.RELATED.values(), synonyms.NOTES)
    )
    assert not same & related and not (same | related) & notes and not notes & keys
    for text in synonyms.NOTES.values():
        assert all(option(name) is not None for name in re.findall(r"config\.(\w+\.\w+)", text))


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--lr=3e-4", "nearest: --config.optimizer.learning_rate=3e-4"),
        ("--batch-size=8", "nearest: --config.train.batch_size=8"),
        ("--optimizer.lr=1", "nearest: --config.optimizer.learning_rate=1"),
        ("--patch_size=16", "nearest: --config.model.variant=VALUE"),
        ("--fp16", "nearest: --config.model.dtype=VALUE"),
        ("--wandb", "metrics are written to metrics.jsonl"),
        ("--output_dir=runs/x", "set the run directory: --workdir=DIR"),
        ("--resume", "run the same command again"),
        ("--wrkdir=x", "nearest: --workdir=x"),
        ("--confg.train.steps=5", "nearest: --config.train.steps=5"),
        ("--qwerty", "options are --config.SECTION.OPTION=VALUE; see --help"),
    ],
)
def test_an_unknown_flag_leads_to_the_option(argument, expected, capsys):
    assert main.main(["--config=configs/digits.py", argument]) == 2
    assert f"error: unknown argument: {argument}\n  {expected}" in capsys.readouterr().err


IN_PYTHON = {
    "c.train.step = 5": "AttributeError: config.train.step does not exist; nearest: config.train.steps: Number of",
    "c.optimizer.lr = 1": "AttributeError: config.optimizer.lr does not exist; nearest: config.optimizer.learning_rate",
    "c.optimzer.lr = 1": "AttributeError: config.optimzer is not a section; nearest: config.optimizer",
    "c.lr = 1": "AttributeError: config.lr is not a section; nearest: config.optimizer.learning_rate",
    "c['optimzer'] = 1": "UnknownOption: config.optimzer is not a section; nearest: config.optimizer",
    "c.update(optimzer={'lr': 1})": "UnknownOption: config.optimzer is not a section; nearest: config.optimizer",
    "c.model.update(wdith=3)": "UnknownOption: config.model.wdith does not exist; nearest: config.model.width: Token",
    "c.train.steps = c.train.stpes": "AttributeError: config.train.stpes does not exist; nearest: config.train.steps:",
    "c.log.wandb = True": "AttributeError: config.log.wandb does not exist; metrics are written to metrics.jsonl",
    "c.train.qwerty = 1": "AttributeError: config.train.qwerty does not exist; allowed: seed, seeds, batch_size",
    "c.train.seeds_at_once = 1": "AttributeError: config.train.seeds_at_once has been removed; omit it: seeds are",
}


@pytest.mark.parametrize("statement", IN_PYTHON)
def test_a_mistake_in_a_config_file_is_named_alike_with_file_and_line(statement, tmp_path, capsys):
    file = tmp_path / "c.py"
    lines = ["from vit_jax import config", "def get_config():", "    c = config.default()"]
    file.write_text("\n".join([*lines, f"    {statement}", "    return c"]))
    assert main.main([f"--config={file}"]) == 2
    error = capsys.readouterr().err
    assert f"\n  {file}:4: {IN_PYTHON[statement]}" in error and error.count("\n") <= 3


def test_a_config_can_be_copied_and_asked_for_what_it_has_not():
    config = options.default()
    config.train.steps = 3
    again = copy.deepcopy(config)
    assert again.to_dict() == config.to_dict() and again.is_locked
    assert config.get("nothing") is None and config.train.get("nothing", 5) == 5
    assert not hasattr(config, "nothing") and not hasattr(config.train, "nothing")
