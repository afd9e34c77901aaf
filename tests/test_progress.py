"""How far a task is: on a terminal, elsewhere, and together with other lines; the lines at the start of a run."""

import fcntl
import io
import math
import pty
import re
import struct
import termios
import threading
import time
import types
from pathlib import Path

import pytest
from helpers import tiny_config

from vit_jax import create_model, progress, terminal
from vit_jax.objectives.classification import Classification
from vit_jax.progress import Counter
from vit_jax.training import describe, setup
from vit_jax.training import progress as training_progress
from vit_jax.training.progress import Progress
from vit_jax.training.run import Run

METRICS = {"train/loss": 0.5, "train/accuracy": 0.25, "train/learning_rate": 1e-3, "images_per_second": 1234.5}


class Terminal(io.StringIO):
    """A terminal of any width; `screen` is what it shows."""

    def isatty(self):
        return True

    def screen(self):
        """Returns its lines, after carriage returns and deletions; colors are left out."""
        lines = re.sub(r"\x1b\[[0-9;]*m", "", self.getvalue()).split("\n")
        return [line.replace("\x1b[K", "").rpartition("\r")[2] for line in lines]


@pytest.fixture
def screen(monkeypatch):
    """Standard output and standard error are one terminal; a task is shown at once."""
    found = Terminal()
    for module in (terminal, progress, training_progress):  # pytest itself sets sys.stdout after the fixtures
        monkeypatch.setattr(module, "sys", types.SimpleNamespace(stdout=found, stderr=found))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name in ("AFTER", "LIVE_SECONDS", "PLAIN_SECONDS"):
        monkeypatch.setattr(progress, name, 0.02)
    return found


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_task_is_one_line_that_is_removed(screen):
    with Counter("decoding", 50_000, "images") as counter:
        counter.add(100)
        counter.add(200)
        wait_for(lambda: "300 of 50,000" in screen.getvalue())
        assert re.fullmatch(r"decoding 300 of 50,000 images  [\d,]+/s  left [\d:]+", screen.screen()[-1])
    assert screen.screen() == [""]


def test_a_short_task_prints_nothing(screen, monkeypatch):
    monkeypatch.setattr(progress, "AFTER", 60.0)
    with Counter("decoding", 10, "images") as counter:
        assert list(counter.over("abc")) == ["a", "b", "c"]
    assert screen.getvalue() == "" and not [one for one in threading.enumerate() if one.name == "progress"]


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(screen):
    log = progress.sys.stderr = terminal.sys.stderr = io.StringIO()
    with Counter("compiling"):
        wait_for(lambda: log.getvalue().count("\n") >= 2)
    assert set(log.getvalue().splitlines()) == {"compiling  0:00"} and screen.getvalue() == ""


def test_rate_and_time_left_are_those_since_the_first_things(monkeypatch):
    """What comes before them, such as compiling, does not count."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Counter("scoring", 1000, "images", enabled=False) as counter:
        now[0] = 110.0
        assert counter.text(110.0) == "scoring 0 of 1,000 images  0:10"
        counter.add(100)
        now[0] = 112.0
        counter.add(200)
        assert counter.text(112.0) == "scoring 300 of 1,000 images  100/s  left 0:07"
        assert counter.text(115.0) == "scoring 300 of 1,000 images  100/s  left 0:04"  # while a batch is computed
        counter.add(900)  # the last batch is padded
        assert counter.text(112.0).startswith("scoring 1,000 of 1,000 images")
    with Counter("downloading", None, "MB", enabled=False) as counter:
        counter.add(1)
        assert counter.text(115.0) == "downloading 1 MB  0:03"


@pytest.mark.parametrize("print_line", [terminal.say, terminal.warn, terminal.output])
def test_what_is_printed_meanwhile_takes_the_place_of_the_line(screen, print_line):
    with Counter("decoding", 10, "images") as counter:
        wait_for(lambda: screen.getvalue())
        print_line("warning: a file is broken")
        seen = len(screen.getvalue())
        counter.add(5)
        wait_for(lambda: "5 of 10" in screen.getvalue()[seen:])
        assert screen.screen()[0] == "warning: a file is broken" and len(screen.screen()) == 2
    assert screen.screen() == ["warning: a file is broken", ""]


def test_the_line_of_training_stays_when_a_task_begins(screen):
    training = Progress(200, steps_per_epoch=20)
    training.show(50, METRICS, 65, recorded=False)
    with Counter("scoring", 10, "images"):
        wait_for(lambda: "scoring" in screen.getvalue())
    training.say("test: accuracy 25 %")
    step, result, rest = screen.screen()
    assert step.startswith("step  50/200") and (result, rest) == ("test: accuracy 25 %", "")


def test_a_brief_run_prints_warnings_only(screen, monkeypatch):
    training = Progress(200, steps_per_epoch=20, name="rate 1", brief=True)
    training.tell("compiled")
    training.show(50, METRICS, 65, recorded=True)
    assert screen.screen()[0].startswith("rate 1: step  50/200")
    training.say("warning: the disk is full")
    assert screen.screen() == ["rate 1: warning: the disk is full", ""]
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    training = Progress(200, steps_per_epoch=20, stream=log, brief=True)
    for now[0] in range(0, 100, 10):
        training.show(int(now[0]), METRICS, 65, recorded=True)
    assert [int(line.split()[1].split("/")[0]) for line in log.getvalue().splitlines()] == [30, 60, 90]


def test_a_narrow_terminal_cuts_the_line(screen, monkeypatch):
    monkeypatch.setattr(terminal, "width", lambda _: 10)
    with Counter("decoding", 10, "images"):
        wait_for(lambda: screen.getvalue())
        assert screen.screen() == ["decoding "]


@pytest.mark.parametrize("columns, text", [(0, "decoding 0 of 10"), (1, ""), (9, "decoding"), (30, "decoding 0 of 10")])
def test_a_real_terminal_shows_one_line(screen, columns, text):
    """0 columns: the width is not known."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(slave, "w") as stream, open(master, "rb", buffering=0) as seen:
        progress.sys.stderr = terminal.sys.stderr = stream
        assert terminal.width(stream) == (columns or 120)
        with Counter("decoding", 10, "images"):
            shown = seen.read(1000).decode()
        assert shown.startswith(f"\r\x1b[K{text}")
        terminal.warn("done")
        while not shown.endswith("done\r\n"):
            shown += seen.read(1000).decode()
        assert shown.endswith("\r\x1b[Kdone\r\n")


@pytest.mark.parametrize("word", ["error:", "warning:", "finished:"])
def test_colors_are_for_terminals_without_no_color(screen, monkeypatch, word):
    text = f"{word} something"
    assert re.fullmatch(rf"\x1b\[[0-9;]+m{word}\x1b\[0m something", terminal.styled(screen, text))
    assert terminal.styled(screen, f"no {text}") == f"no {text}"
    assert terminal.styled(io.StringIO(), text) == text
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.styled(screen, text) == text


@pytest.mark.parametrize("stream", [None, "closed", "broken"])
def test_a_stream_that_cannot_be_written_does_not_end_the_task(screen, monkeypatch, stream):
    if stream is not None:
        stream = Terminal()
        monkeypatch.setattr(stream, "write", _broken)
    progress.sys.stderr = terminal.sys.stderr = stream
    with Counter("decoding", 10, "images") as counter:
        time.sleep(0.1)
        assert list(counter.over(range(10))) == list(range(10))


def _broken(_):
    raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture(scope="module")
def experiment():
    """Its FLOPs are given, since counting them takes a second."""
    config = tiny_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.Experiment, "forward_flops", 67_900)
        yield setup.assemble(config, setup.check(config), setup.load_sources(config))


def test_a_run_begins_with_a_few_lines(experiment):
    """The model in one line that begins with its variant; the table of parameters only on request."""
    config, lines = experiment.config, describe.experiment(experiment).splitlines()
    assert len(lines) <= 5
    (model,) = [line for line in lines if line.startswith("model: ")]
    assert model.startswith(f"model: {config.model.variant} (width {config.model.width}, depth {config.model.depth}, ")
    assert f", {experiment.num_parameters:,} parameters, 67.9 kFLOP per image (forward), float32" in model
    table = describe.experiment(experiment, parameters=True)
    assert "head/logits/kernel" in table and table.splitlines()[-len(lines) :] == lines
    assert len(table.splitlines()) > 15 and "head/logits/kernel" not in "".join(lines)


def test_a_resumed_run_names_its_learning_rate(experiment):
    """The schedule is that of the new length: a linear warm-up, then half a cosine."""
    optimizer = experiment.config.optimizer
    warmup, steps = min(optimizer.warmup_steps, experiment.num_steps), experiment.num_steps
    assert optimizer.schedule == "cosine"
    for step in (1, 10, 19):
        share = min(1.0, step / warmup) if warmup else 1.0
        if step > warmup:
            share = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        line = describe.start(experiment, step, step, Path("runs/a"), [])
        assert line.startswith(f"resuming at step {step} of {steps} steps of 64 images") and line.endswith("runs/a")
        assert f", at learning rate {share * optimizer.learning_rate:.2e}, in" in line
    assert "rate" not in describe.start(experiment, 0, 0, Path("runs/a"), [])
    assert "rate" not in describe.start(experiment, steps, steps, Path("runs/a"), [])


@pytest.mark.parametrize("classes, is_printed", [(2, False), (5, False), (6, True)])
def test_top_5_accuracy_is_not_printed_for_five_classes_or_fewer(classes, is_printed):
    """It is in the results, and thus in the files."""
    results = {"test/accuracy": 0.5, "test/top5": 1.0, "test/loss": 0.7, "test/examples": 10}
    lines, module = [], create_model("Ti/4", classes=classes)
    experiment = types.SimpleNamespace(
        evaluate=lambda *_: (results, {}), objective=Classification(), module=module, num_steps=2
    )
    state = types.SimpleNamespace(for_evaluation=dict)
    shown = types.SimpleNamespace(tell=lines.append)
    run = types.SimpleNamespace(
        experiment=experiment, state=state, stop_requested=None, evaluated={}, progress=shown, step=1
    )
    assert Run.evaluate(run, "test") == results and run.evaluated == results
    middle = ", top-5 100.00 %" if is_printed else ""
    assert lines == [f"step 1/2  test: accuracy 50.00 %{middle}, loss 0.7000 on 10 examples"]


@pytest.mark.parametrize("mixup, cutmix, is_said", [(0.2, 0.0, True), (0.0, 1.0, True), (0.0, 0.0, False)])
def test_mixed_images_are_named_where_their_accuracy_is_shown(experiment, mixup, cutmix, is_said):
    experiment.config.augment.update(mixup=mixup, cutmix=cutmix)
    assert ("measured on mixed images" in describe.experiment(experiment)) == is_said


@pytest.mark.parametrize(
    "count, text",
    [(7, "7"), (541_578, "541,578"), (999_999, "999,999"), (10**6, "1.0 M"), (85_800_000, "85.8 M"), (1.25e9, "1.2 G")],
)
def test_numbers_are_short(count, text):
    assert describe.short(int(count)) == text


@pytest.mark.parametrize("count, text", [(512, "512"), (67_900, "67.9 k"), (5_560_000_000, "5.6 G")])
def test_no_number_of_operations_is_exact(count, text):
    assert describe.short(count, 1000) == text
