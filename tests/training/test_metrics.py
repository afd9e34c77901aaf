"""metrics.jsonl, TensorBoard events, the progress line and throughput."""

import io
import json

import pytest

from vit_jax import atomic
from vit_jax.checkpoint import run_files
from vit_jax.progress import clock
from vit_jax.training.metrics import MetricsWriter
from vit_jax.training.progress import Progress, progress_line
from vit_jax.training.throughput import Throughput


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_continues_the_lines_of_its_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, 0, tensorboard=False) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"train/loss": 1 / step})
    with open(tmp_path / run_files.METRICS, "a") as file:
        file.write('{"step": 40, "train/lo')  # the writer was killed in the middle of a line
    with MetricsWriter(tmp_path, 20, tensorboard=False) as writer:
        writer.write(30, {"train/loss": 0.5})
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path / run_files.METRICS)] == [
        (10, 0.1),
        (20, 0.05),
        (30, 0.5),
    ]


def test_tensorboard_events_hold_the_metrics(tmp_path):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format is TFRecord: length, crc, data, crc)

    with MetricsWriter(tmp_path, 0, tensorboard=True) as writer:
        writer.write(5, {"test/accuracy": 0.75})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, scalars = path.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert scalars == {("test/accuracy", 5): 0.75}


def test_not_on_a_terminal_only_recorded_steps_are_printed():
    stream = io.StringIO()
    progress = Progress(200, steps_per_epoch=20, stream=stream)
    metrics = {"train/loss": 0.5, "train/accuracy": 0.25, "train/learning_rate": 1e-3, "images_per_second": 1234.5}
    progress.show(50, metrics, 65, recorded=True)
    progress.show(60, metrics, 60, recorded=False)
    progress.say("done")
    assert stream.getvalue() == (
        "step  50/200  epoch 2.5  loss 0.5000  accuracy 25.0 %  rate 1.00e-03  1,234 images/s  left 1:05\ndone\n"
    )


def test_a_narrow_terminal_shows_the_most_important_parts():
    metrics = {"train/loss": 0.5, "train/accuracy": 0.25, "train/learning_rate": 1e-3, "images_per_second": 1234.5}
    metrics["mfu"] = 0.412
    wide, narrow = (progress_line(50, 200, 2.5, metrics, 65, width) for width in (None, 80))
    assert wide.endswith("rate 1.00e-03  1,234 images/s  MFU 41.2 %  left 1:05")
    assert narrow == "step  50/200  loss 0.5000  accuracy 25.0 %  1,234 images/s  left 1:05"


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (65, "1:05"), (7400, "2:03:20")])
def test_durations(seconds, text):
    assert clock(seconds) == text


def test_throughput_counts_neither_pauses_nor_earlier_processes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    throughput = Throughput(images_per_step=8, flops_per_image=1e9, peak_flops=4e9, seconds=100.0)
    throughput.start(10)
    now[0] = 2.0
    assert throughput.speed(15, mark=True) == {"images_per_second": 20.0, "mfu": 5.0}
    throughput.pause()
    now[0] = 50.0
    throughput.start(15)
    now[0] = 54.0
    assert throughput.speed(20, mark=False)["images_per_second"] == 10.0
    assert throughput.seconds() == 106.0
    assert throughput.time_left(20, 30) == 6.0  # ten steps of 0.6 s


def test_after_a_rewind_the_speed_is_that_of_the_repeated_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    throughput = Throughput(images_per_step=8, flops_per_image=1e9, peak_flops=None)
    throughput.start(10)
    now[0] = 4.0
    throughput.rewind(5)
    assert throughput.speed(5, mark=True) == {}
    now[0] = 6.0
    assert throughput.speed(10, mark=True) == {"images_per_second": 20.0}
    assert throughput.seconds() == 6.0 and throughput.time_left(10, 15) == 6.0


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    atomic.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
