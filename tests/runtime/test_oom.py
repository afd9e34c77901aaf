"""The advice that replaces an out-of-memory error."""

import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.models.summary import training_bytes
from vit_jax.runtime import oom

ERROR = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."


class Device:
    """A device with this many bytes of memory."""

    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return {"bytes_limit": self.limit}


@pytest.mark.parametrize("remat", [False, True])
def test_the_advice_names_the_smallest_accumulation_that_fits(toy, make_config, monkeypatch, remat):
    run = toy(make_config(model={"remat": remat, "scan": remat}, train={"batch_size": 64}))
    size = {count: sum(training_bytes(run.model, (4, 4), 1, count).values()) for count in (8, 16, 64)}
    # Sixteen images per device need less than four fifths of the memory, thirty-two more.
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(int(1.3 * size[16]))])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(UserError) as caught, oom.explained(run.config, run.model, (4, 4, 1)):
        raise jax.errors.JaxRuntimeError(ERROR)
    message = str(caught.value)
    assert message.startswith("out of memory: a microbatch of 64 images per device needs about ")
    assert "with the same batch size of 64: --config.train.accumulation=4" in message
    assert ("--config.model.remat=True --config.model.scan=True" in message) == (not remat)
    assert len(message.splitlines()) == 3


def test_if_nothing_else_helps_a_smaller_batch_is_advised(toy, make_config, monkeypatch):
    run = toy(make_config(model={"remat": True, "scan": True}, train={"batch_size": 1}))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(UserError) as caught, oom.explained(run.config, run.model, (4, 4, 1)):
        raise MemoryError
    assert "same batch size" not in str(caught.value) and "decrease config.train.batch_size" in str(caught.value)


def test_other_errors_are_not_changed(toy, make_config):
    run = toy(make_config())
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        oom.explained(run.config, run.model, (4, 4, 1)),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
