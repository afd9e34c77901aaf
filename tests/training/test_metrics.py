import io
import json
import math

import pytest

from vit_jax import atomic
from vit_jax.checkpoint import run_files
from vit_jax.runtime import hardware
from vit_jax.training.metrics import MetricsWriter
from vit_jax.training.progress import Progress, clock, progress_line
from vit_jax.training.throughput import Meter


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_writes_on_from_its_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, 0, tensorboard=False) as log:
        for step in (10, 20, 30):
            log.write(step, {"train/loss": 1 / step})
    with open(tmp_path / run_files.METRICS, "a") as file:
        file.write('{"step": 40, "train/lo')  # killed in the middle of a line
    with MetricsWriter(tmp_path, 20, tensorboard=False) as log:
        log.write(30, {"train/loss": 0.5})
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path / run_files.METRICS)] == [
        (10, 0.1),
        (20, 0.05),
        (30, 0.5),
    ]


def test_tensorboard_events_hold_the_metrics(tmp_path):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format is TFRecord: length, crc, data, crc)

    with MetricsWriter(tmp_path, 0, tensorboard=True) as log:
        log.write(5, {"test/accuracy": 0.75})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, scalars = path.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert scalars == {("test/accuracy", 5): 0.75}


def test_the_progress_line_off_a_terminal_is_plain_and_only_for_records():
    stream = io.StringIO()
    progress = Progress(200, steps_per_epoch=20, stream=stream)
    metrics = {"train/loss": 0.5, "train/accuracy": 0.25, "train/learning_rate": 1e-3, "images_per_second": 1234.5}
    progress.show(50, metrics, 65, recorded=True)
    progress.show(60, metrics, 60, recorded=False)
    progress.say("done")
    assert stream.getvalue() == (
        "step  50/200  epoch 2.5  loss 0.5000  accuracy 25.0 %  rate 1.00e-03  1,234 images/s  left 1:05\ndone\n"
    )


def test_in_a_narrow_terminal_the_least_important_parts_give_way():
    metrics = {"train/loss": 0.5, "train/accuracy": 0.25, "train/learning_rate": 1e-3, "images_per_second": 1234.5}
    metrics["mfu"] = 0.412
    wide, narrow = (progress_line(50, 200, 2.5, metrics, 65, width) for width in (None, 80))
    assert wide.endswith("rate 1.00e-03  1,234 images/s  MFU 41.2 %  left 1:05")
    assert narrow == "step  50/200  loss 0.5000  accuracy 25.0 %  1,234 images/s  left 1:05"


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (65, "1:05"), (7400, "2:03:20")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_the_meter_counts_neither_pauses_nor_what_was_counted_before(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    meter = Meter(images_per_step=8, flops_per_image=1e9, peak=4e9, seconds=100.0)
    meter.run(10)
    now[0] = 2.0
    assert meter.speed(15, mark=True) == {"images_per_second": 20.0, "mfu": 5.0}
    meter.pause()
    now[0] = 50.0
    meter.run(15)
    now[0] = 54.0
    assert meter.speed(20, mark=False)["images_per_second"] == 10.0
    assert meter.seconds() == 106.0
    assert meter.left(20, 30) == 6.0  # ten more at 0.6 s


def test_peaks_are_found_by_device_kind():
    assert hardware.peak("NVIDIA H200") == hardware.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert hardware.peak("NVIDIA H100 PCIe") == 756e12
    assert hardware.peak("NVIDIA A100-SXM4-40GB") == 312e12
    assert hardware.peak("TPU v5 lite") == 197e12
    assert hardware.peak("cpu") is None
    assert all(math.isfinite(value) for value in hardware.PEAKS.values())


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    atomic.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
