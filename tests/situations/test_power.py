"""Power failures, storms of signals, processes that sleep while others take over, no open files or threads left.

The runs of this file are real, on real file systems; each must end bit for bit like an uninterrupted one.
"""

import contextlib
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import THOROUGH, flags, num_records, read_metrics, start_command, wait_until
from PIL import Image

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.training import lock, tensorboard

STEPS, SAVED_EVERY = 120, 6
RUN = [
    "--config=configs/digits.py",
    *flags(
        model={"variant": "Ti/4", "width": 16, "depth": 1, "heads": 2, "mlp_width": 16, "dropout": 0.1},
        data={"name": "folder", "image_size": 8, "validation": None, "labels": "label"},
        train={"epochs": None, "steps": STEPS, "evaluate_every": 40, "batch_size": 16, "steps_per_dispatch": 2},
        checkpoint={"every": SAVED_EVERY, "keep": 1, "keep_best": 0},
        log={"every": 3},
    ),
]
RECORDS = STEPS // 3 + 2  # two evaluations are not at the step of a record
STREAMED = flags(data={"decoded": False, "resident": "never", "workers": 2})
# EXT4_IOC_SHUTDOWN and its flag: the file system stops, and what is not on the disk yet is lost.
SHUTDOWN, WITHOUT_FLUSHING = 0x8004587D, 2
# What happens in the run when the power fails, the storm begins, or the process is put to sleep.
MOMENTS = ("saving", "recorded", "saved", "started", "locked", "finished", "stopped")


class Disk:
    """An ext4 file system in a file, whose power can fail."""

    def __init__(self, base, options):
        """Creates and mounts the file system; skips the test where that is not possible."""
        self._image, self.path, self._options = base / "disk", base / "mounted", options
        self.path.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(96 * 2**20)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True, capture_output=True)
            self._mount()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount an ext4 file system in a file: {error}")

    def _mount(self):
        subprocess.run(
            ["mount", "-o", f"loop,{self._options}", self._image, self.path], check=True, capture_output=True
        )

    def lose_power(self):
        """Stops the file system at once: what is not on the disk is lost, and whatever uses it fails."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING))
        finally:
            os.close(descriptor)

    def restart(self):
        """Mounts the file system again, as after a boot."""
        self.unmount()
        self._mount()

    def unmount(self):
        """Unmounts the file system; processes that still have files open keep them."""
        for _ in range(100):
            if (
                not os.path.ismount(self.path)
                or not subprocess.run(["umount", self.path], capture_output=True).returncode
            ):
                return
            time.sleep(0.05)
        subprocess.run(["umount", "-l", self.path], check=True)


@pytest.fixture
def make_disk(tmp_path):
    """A function that makes a disk with these mount options."""
    with contextlib.ExitStack() as stack:

        def make(options):
            disk = Disk(tmp_path, options)
            stack.callback(disk.unmount)
            return disk

        yield make


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    directory, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 8)):
        for index in range(count):
            path = directory / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return directory


class Command:
    """The training command in a process, and what it has printed so far."""

    def __init__(self, workdir, images, *arguments, program="vit_jax.main", **variables):
        """Starts it."""
        arguments = (*RUN, f"--config.data.dir={images}", *arguments, f"--workdir={workdir}")
        self.process, self.workdir, self.output = start_command(program, *arguments, **variables), workdir, ""
        os.set_blocking(self.process.stdout.fileno(), False)
        self._saved, self._records = steps(workdir), num_records(workdir)

    def read(self):
        """All that the process has printed."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.process.stdout.fileno(), 2**16):
                self.output += part.decode()
        return self.output

    def wait_for(self, moment, chance):
        """Waits for a moment of the run, and a random time after it."""
        wanted, last = min(self._records + chance.randrange(1, 9), RECORDS), ""
        if moment == "started":
            time.sleep(3 * chance.random())
        elif moment == "locked":
            wait_until(self.process, (self.workdir / lock.NAME).exists)
        elif moment == "saved":
            wait_until(self.process, lambda: set(steps(self.workdir)) - set(self._saved))
        elif moment == "finished":
            last = chance.choice(["step 120/120  test", "finished: ", "results are in"])
        else:
            wait_until(self.process, lambda: num_records(self.workdir) >= wanted)
            if moment == "saving":
                wait_until(self.process, lambda: is_saving(self.workdir))
            if moment == "stopped" and self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                last = "saved in"
        wait_until(self.process, lambda: last in self.read())
        time.sleep(chance.choice([0, 0, 0.01, 0.1]) * chance.random())

    def end(self, timeout=300):
        """Waits for the end; its status and output."""
        try:
            self.process.wait(timeout)
        finally:
            self.kill()
        return self.process.returncode, self.read()

    def kill(self):
        """Ends the process, if it still runs."""
        self.process.kill()
        self.process.wait()


def entries(workdir):
    """The names in the directory of checkpoints, which the proof at the start makes and removes."""
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(workdir / "checkpoints")
    return []


def steps(workdir):
    return sorted(int(name) for name in entries(workdir) if name.isdigit())


def is_saving(workdir):
    return any("tmp" in name for name in entries(workdir))


def outcome(workdir):
    """The digests of the last state, the records of metrics.jsonl, and the steps of the TensorBoard events."""
    from tensorboardX.proto.event_pb2 import Event

    with CheckpointManager(workdir, read_only=True) as checkpoints:
        digests = checkpoints.content(STEPS)["digests"]
        assert not checkpoints.corrupt()
    content = b"".join(path.read_bytes() for path in workdir.glob("events.out.tfevents.*"))
    events = [Event.FromString(record[12:-4]) for record in tensorboard.records(content)]
    shown = sorted((event.step, value.tag) for event in events for value in event.summary.value)
    return digests, read_metrics(workdir), [(step, tag) for step, tag in shown if tag.startswith(("train/l", "test/"))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, images):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    status, output = Command(workdir, images).end()
    assert status == 0, output
    return outcome(workdir)


def finishes(workdir, images, uninterrupted, *arguments):
    """The run is resumed and ends like an uninterrupted one; then it is removed."""
    status, output = Command(workdir, images, *arguments).end()
    assert status == 0 and "Traceback" not in output, output
    assert outcome(workdir) == uninterrupted
    shutil.rmtree(workdir)


def lose_power_during(disk, workdir, images, moment, chance):
    """Starts or resumes the run, and lets the power fail at a moment; checks that what was promised was kept."""
    run = Command(workdir, images, XDG_CACHE_HOME=str(disk.path / "cache"))
    run.wait_for(moment, chance)
    run.process.send_signal(signal.SIGSTOP)
    output, saved = run.read(), steps(workdir)
    disk.lose_power()
    run.kill()
    disk.restart()
    print(moment, "after", num_records(workdir), "records,", saved, "->", steps(workdir))
    assert "error" not in output and "Traceback" not in output, output
    # An older checkpoint is removed only when a newer one is on the disk.
    if len(saved) > 1 or saved > [SAVED_EVERY]:
        assert steps(workdir)[-1] >= saved[0]
    if "saved in" in output:
        assert steps(workdir)[-1] == saved[-1]
    if "finished: " in output:
        assert steps(workdir) == [STEPS] and json.loads((workdir / "summary.json").read_text())["steps"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(("options", "count"), [("delalloc,noauto_da_alloc,commit=30", 2), ("nodelalloc,commit=1", 1)])
def test_power_failures(uninterrupted, images, make_disk, options, count):
    """The run directory and the caches are on the disk that fails: 3 times, 30 if thorough."""
    disk, chance = make_disk(options), random.Random(options)
    workdir = disk.path / "run"
    for index in range(15 if THOROUGH else count):
        lose_power_during(disk, workdir, images, MOMENTS[index % len(MOMENTS)], chance)
        if (workdir / "summary.json").exists():
            finishes(workdir, images, uninterrupted)
    finishes(workdir, images, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["saving"] if not THOROUGH else ["started", "locked", "recorded", "saving", "saved"])
def test_a_disk_that_fails_ends_the_run_with_the_reason(uninterrupted, images, make_disk, moment):
    disk = make_disk("delalloc")
    run = Command(disk.path / "run", images)
    run.wait_for(moment, random.Random(moment))
    disk.lose_power()
    status, output = run.end()
    assert status == 2 and "Input/output error" in output and "Traceback" not in output, output
    assert len(output[output.rindex("error: ") :].splitlines()) <= 3
    disk.restart()
    finishes(disk.path / "run", images, uninterrupted)


STORM = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGWINCH, signal.SIGCHLD]
STORM += [signal.SIGPIPE, signal.SIGCONT]


@pytest.mark.slow
def test_storms_of_signals(uninterrupted, images, tmp_path):
    """Up to 40 signals in quick succession, of all kinds or of one: 2 times, 20 if thorough."""
    chance, workdir = random.Random(0), tmp_path / "run"
    for index in range(20 if THOROUGH else 2):
        moment = MOMENTS[index % len(MOMENTS)]
        run, kinds = Command(workdir, images), chance.choice([STORM, [signal.SIGINT], [signal.SIGTERM], STORM[4:]])
        run.wait_for(moment, chance)
        for _ in range(chance.randrange(2, 40)):
            if run.process.poll() is None:
                run.process.send_signal(chance.choice(kinds))
                time.sleep(chance.choice([0, 0, 0, 0.001, 0.01, 0.1]))
        status, output = run.end()
        print(moment, [kind.name for kind in kinds], "status", status)
        # 0: stopped or finished; -n: before the run can receive signals; 128 + n: at once, at the second signal.
        assert status in {0, 130, *(-number for number in STORM), *(128 + number for number in STORM)}, output
        assert "Exception ignored" not in output and "vit_jax/" not in output.partition("Traceback")[2], output
        assert not (workdir / lock.NAME).exists() or status < 0
        if (workdir / "summary.json").exists():
            finishes(workdir, images, uninterrupted)
    finishes(workdir, images, uninterrupted)


ON_ANOTHER_HOST = """
import sys
from vit_jax import main
from vit_jax.training import lock
this_system = lock._this_system
lock._this_system = lambda: {**this_system(), "host": "elsewhere"}
sys.exit(main.main(sys.argv[1:]))
"""


def files_in(directory):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_process_that_wakes_up_after_another_took_over_writes_nothing(uninterrupted, images, tmp_path):
    """It sleeps until the lock is stale; the other one is then finished, or still running: 2 times, 10 if thorough."""
    chance = random.Random(0)
    moments = ("saving", "recorded", "saved", "locked", "saving")
    for index in range(10 if THOROUGH else 2):
        workdir, moment = tmp_path / str(index), moments[index % len(moments)]
        sleeper = Command(workdir, images)
        sleeper.wait_for(moment, chance)
        sleeper.process.send_signal(signal.SIGSTOP)
        records, stale = num_records(workdir), time.time() - lock.STALE_AFTER - 1
        os.utime(workdir / lock.NAME, (stale, stale))
        other = Command(workdir, images, program=ON_ANOTHER_HOST)
        if index % 2:
            wait_until(other.process, lambda workdir=workdir, records=records: num_records(workdir) > records)
        else:
            assert other.end()[0] == 0
        before = files_in(workdir)
        sleeper.process.send_signal(signal.SIGCONT)
        status, output = sleeper.end(60)
        print(moment, "after", records, "records", "status", status)
        assert status == 2 and f"has been taken over by process {other.process.pid} on elsewhere" in output, output
        if index % 2:
            assert other.end()[0] == 0
        else:
            assert files_in(workdir) == before
        assert outcome(workdir) == uninterrupted


@contextlib.contextmanager
def no_files(pid):
    """The process cannot open any further file."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, hard))
    yield
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def no_threads(pid):
    """The process cannot start any further thread."""
    group = Path(f"/sys/fs/cgroup/pids/vit_jax-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text("0")
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        pytest.skip(f"cannot limit the threads of a process: {error}")
    try:
        yield
        (group / "pids.max").write_text("max")
    finally:
        parent = group.parent / "cgroup.procs"
        for member in (group / "cgroup.procs").read_text().split():
            parent.write_text(member)
        group.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "moment", "arguments"),
    [
        (no_files, "saving", []),
        (no_files, "recorded", STREAMED),
        (no_threads, "recorded", []),
        *([(no_files, "recorded", []), (no_threads, "recorded", STREAMED)] if THOROUGH else []),
    ],
)
def test_no_files_or_threads_left_for_some_time(uninterrupted, images, tmp_path, limit, moment, arguments):
    run, chance = Command(tmp_path / "run", images, *arguments), random.Random(0)
    run.wait_for(moment, chance)
    with limit(run.process.pid), contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(1.5)
    status, output = run.end()
    # JAX may say that its cache of compiled programs cannot be read.
    own = "\n".join(line for line in output.splitlines() if "compilation cache" not in line)
    assert status == 0 and not any(word in own for word in ("Traceback", "Exception", "corrupt", "Warning")), output
    assert outcome(tmp_path / "run") == uninterrupted


@pytest.mark.slow
def test_without_open_files_until_the_end_the_run_says_so(images, tmp_path):
    run = Command(tmp_path / "run", images)
    run.wait_for("recorded", random.Random(0))
    with no_files(run.process.pid):
        status, output = run.end()
    assert status == 2 and "Traceback" not in output, output
    assert "Too many open files" in output[output.rindex("error: ") :]
