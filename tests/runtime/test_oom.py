"""Too little memory: what the message says to do about it."""

import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.models.summary import training_bytes
from vit_jax.runtime import oom


class Device:
    """One with so much memory."""

    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return {"bytes_limit": self.limit}


@pytest.mark.parametrize("remat", [False, True])
def test_what_would_fit_is_said(toy, make_config, monkeypatch, remat):
    run = toy(make_config(model={"remat": remat, "scan": remat}, train={"batch_size": 64}))
    size = {count: sum(training_bytes(run.model, (4, 4), 1, count).values()) for count in (8, 16, 64)}
    # Sixteen images a device fit into four fifths of it, and thirty-two do not.
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(1.3 * size[16])])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(UserError) as caught, oom.explained(run.config, run.model, (4, 4, 1)):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.")
    said = str(caught.value)
    assert said.startswith("out of memory: 64 images at a time on each device need about ")
    assert "the same batch of 64 in parts: --config.train.accumulation=4" in said
    assert ("--config.model.remat=True --config.model.scan=True" in said) == (not remat)
    assert len(said.splitlines()) == 3


def test_other_errors_stay_what_they_are(toy, make_config):
    run = toy(make_config())
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        oom.explained(run.config, run.model, (4, 4, 1)),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
