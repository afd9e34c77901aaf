"""Training several seeds at once in one program, beside training them one after another.

    python benchmarks/seeds.py --seeds=2
    python benchmarks/seeds.py --config=configs/digits.py --seeds=4 --steps=20

The same steps of the same seeds on the same devices, the two ways taking turns in one process. One JSON line a way:
`images_per_second` of all seeds together (median over the turns), `compile_s`, `memory_mb` (what the compiled program
takes); and for `at_once` the `ratio`, the median over the turns of its speed divided by the other's, with the least and
the most.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import jax
import numpy as np

from vit_jax import config as options
from vit_jax.data import pipeline
from vit_jax.runtime import oom
from vit_jax.training import setup
from vit_jax.training.program import Program


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="how many (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each way (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each seed a turn (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="another option")
    return parser.parse_args(arguments)


class Way:
    """The seeds' states, and how a turn of steps is made of them."""

    def __init__(self, program: Program, flags: argparse.Namespace, at_once: bool):
        self.name = "at_once" if at_once else "one_after_another"
        self.at_once, self.turns, self.feeds = at_once, [], program.feeds["train"]
        self.count, self.seeds = np.int32(flags.steps), [np.int32(seed) for seed in range(flags.seeds)]
        self.size, self.examples = program.run.config.train.batch_size, len(program.run.sources["train"])
        self.rows = program.rows
        began = time.perf_counter()
        self.update = program.compile(lambda _: None, flags.seeds if at_once else None)
        self.compile_s = time.perf_counter() - began
        self.states = [program.run.initial_state() for _ in self.seeds]
        self.turn()

    def turn(self) -> float:
        """Images a second, of all seeds together."""
        began = time.perf_counter()
        first, count = int(self.states[0].step), int(self.count)
        tables = (
            pipeline.train_indices(int(seed), self.size, first, count, self.rows, self.examples) for seed in self.seeds
        )
        feeds = [self.feeds.feed(table) for table in tables]
        if self.at_once:
            arguments = (self.states, feeds, [self.count] * len(feeds), self.seeds)
            ends = self.update(*map(tuple, arguments))
        else:
            ends = [
                self.update(state, feed, self.count, seed)
                for state, feed, seed in zip(self.states, feeds, self.seeds, strict=True)
            ]
        self.states = [state for state, _ in ends]
        jax.block_until_ready(self.states)
        return len(feeds) * count * self.size / (time.perf_counter() - began)


def main(flags: argparse.Namespace) -> None:
    config = options.load(flags.config)
    for assignment in [*flags.set, f"train.steps_per_dispatch={flags.steps}"]:
        options.override(config, assignment)
    options.check(config)
    program = Program(setup.build(config, setup.check(config)))
    ways = [Way(program, flags, at_once) for at_once in (False, True)]
    for turn in range(flags.turns):
        for way in ways if turn % 2 else ways[::-1]:
            way.turns.append(way.turn())
    for way in ways:
        line = {"name": way.name, "seeds": flags.seeds, "images_per_second": round(statistics.median(way.turns), 1)}
        line |= {"compile_s": round(way.compile_s, 1), "memory_mb": round(oom.bytes_needed(way.update) / 2**20, 1)}
        if way.at_once:
            ratios = [b / a for a, b in zip(ways[0].turns, way.turns, strict=True)]
            line |= {"ratio": round(statistics.median(ratios), 3), "least": round(min(ratios), 3)}
            line["most"] = round(max(ratios), 3)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
