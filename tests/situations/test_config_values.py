"""Random config values: each is accepted and survives config.json, or is refused in at most three lines."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import THOROUGH, TINY

from vit_jax import config as options
from vit_jax.config.check import check_config
from vit_jax.config.load import option
from vit_jax.errors import UserError
from vit_jax.training import setup
from vit_jax.training.step import train_step

COUNT = 2000 if THOROUGH else 200
BUILT = 100 if THOROUGH else 8
TEXTS = (
    *(
        "",
        " ",
        "None",
        "none",
        "True",
        "false",
        "TRUE",
        "yes",
        "1e3",
        "0x10",
        "1_000",
        "٣",
        "½",
        "²",
        "-1",
        "0",
        "1",
        "2",
    ),
    *(
        "3",
        "8",
        "-0",
        "+5",
        "1e400",
        "-1e400",
        "nan",
        "inf",
        "-inf",
        "9" * 25,
        "9" * 5000,
        "1e-400",
        "0.1",
        "0.5",
        "1.5",
    ),
    *("0.9999999999999999999", "1e308", "1e39", "a", "é中文", "\x00", "\n", "a\nb", " 4 ", "[]", "()", "{}", "[1,2]"),
    *("1,2", "1,", ",", ",,", "1,1", "a=1", "=1", "a=b", "label=1", "label=nan", "label=1,label=2", "label=1=2", "1:2"),
    *("2:1", "::", "0:" + "9" * 30, "'x'", "x" * 10000, "../..", "/", "~", "%s", "{0}", "$HOME", "--", "auto", "full"),
    *(
        "dots",
        "init_from",
        "train",
        "train[:50%]",
        "train[",
        "train+test",
        "Ti/4",
        "B/0",
        "R50+B/16",
        "X/4",
        "Ti/99999",
    ),
    *(
        "S/2",
        "H/8",
        "*",
        "**",
        "[",
        "head/*",
        "0.0",
        "1.",
        "1__0",
        "2147483647",
        "2147483648",
        "1000000000",
        "0.25",
        "64",
    ),
)
VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        4,
        16,
        -1,
        10**30,
        -(10**30),
        10**5000,
        2**31,
        0.25,
        0.5,
        1.0,
        1.5,
        -0.5,
        1e308,
        3.5e38,
    ),
    *(float("nan"), float("inf"), "", "a", "é", "\x00", "\ud800", "x" * 10000, b"x", [], [1], [1, 2], [None], ["a"]),
    *(["a", "a"], [["a", 1]], [[["a"]]], ("label",), ("label", "parity"), (), {}, {"a": 1}, {"label": 1}, {1: 2}, 1j),
    *(
        {"label": float("nan")},
        np.int64(3),
        np.float32(0.5),
        np.bool_(True),
        np.array([1, 2]),
        np.array(3),
        np.str_("a"),
    ),
    *(
        object(),
        int,
        print,
        range(3),
        {1, 2},
        slice(1),
        Ellipsis,
        np.float64("nan"),
        jnp.int32(4),
        "none",
        "linear",
        "sgd",
    ),
)


def set_random(config, how: str, name: str, generator: random.Random):
    """Sets one option to a random value; returns the config."""
    section, key = name.split(".")
    one = option(name)
    if how == "command line":
        text = generator.choice([*TEXTS, *map(str, (*one.choices, *one.words))])
        options.override(config, f"{name}={text}")
        return config
    value = generator.choice([*VALUES, *one.choices, *one.words])
    if how == "config.json":
        return options.from_dict(config.to_dict() | {section: config[section].to_dict() | {key: value}})
    try:
        config[section][key] = value
    except (TypeError, ValueError, OverflowError) as error:  # of ml_collections; `load` reports it
        raise UserError(str(error)[:80]) from None
    return config


def draw(seed: int):
    """A random config and the options that were set."""
    generator = random.Random(seed)
    config = options.default()
    config.model.update(TINY)
    config.train.update(steps=4, batch_size=8)
    names = generator.sample(options.names(), generator.choice((1, 1, 2, 3)))
    for name in names:
        config = set_random(config, generator.choice(("command line", "config.json", "config file")), name, generator)
    check_config(config)
    return config, names


def draw_accepted(count: int):
    """Checks `count` random configs; returns those that were accepted, with the options that were set."""
    accepted = []
    for seed in range(count):
        try:
            config, names = draw(seed)
        except UserError as error:
            assert 1 <= len(str(error).splitlines()) <= 3 and len(str(error)) < 1500, error
            continue
        text = json.dumps(config.to_dict(), allow_nan=False)
        text.encode()
        restored = options.from_dict(json.loads(text))
        check_config(restored)
        assert restored.to_dict() == config.to_dict()
        assert json.dumps(restored.to_dict()) == text
        accepted.append((config, names))
    return accepted


def test_a_random_value_is_accepted_or_refused_in_three_lines():
    assert 0.03 * COUNT < len(draw_accepted(COUNT)) < 0.9 * COUNT


def build(config):
    """Traces a training step of a config, without compiling it."""
    mesh = setup.check(config)
    run = setup.assemble(config, mesh, setup.load_sources(config))
    batch, source = config.train.batch_size, run.sources["train"]
    images = jax.ShapeDtypeStruct((batch, *source.image_shape), np.uint8)
    labels = jax.tree.map(lambda values: jax.ShapeDtypeStruct((batch,), values.dtype), source.targets())
    jax.eval_shape(lambda *arguments: train_step(run, *arguments, 0), run.abstract_state(), images, labels)


@pytest.mark.slow
def test_an_accepted_config_is_built_or_refused_in_three_lines(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    built = 0
    for config, names in draw_accepted(2000)[:BUILT]:
        try:
            build(config)
            built += 1
        except UserError as error:
            assert len(str(error).splitlines()) <= 3, error
        except Exception as error:
            error.add_note(f"config: {[(name, config[name.split('.')[0]][name.split('.')[1]]) for name in names]}")
            raise
    assert built > BUILT / 3
