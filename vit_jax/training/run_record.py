"""What a run directory records about a run: config, steps at which options changed, machine and data."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import atomic
from vit_jax import config as options
from vit_jax.checkpoint import input_spec, run_files
from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.errors import UserError
from vit_jax.sharding import multihost
from vit_jax.training import initial_weights


class RunRecord:
    """The files that describe a run, up to the step of its newest checkpoint.

    A checkpoint has the config under which its last step was trained, and the changes until then. config.json and
    changes.jsonl have those of the newest checkpoint: a run that resumes with another config, and ends before it has
    saved a checkpoint, leaves them as they were. Before the first checkpoint they have the config of the run.

    Attributes:
        environment: the content of environment.json.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        environment: dict[str, Any],
        spec: InputSpec | None = None,
        on_save: Callable[[], None] | None = None,
    ):
        """Writes nothing yet.

        Args:
            config: of the run.
            workdir: the run directory.
            environment: the content of environment.json.
            spec: the content of data.json; None if there is to be none.
            on_save: is called after each checkpoint.
        """
        self._config, self._workdir, self.environment = config, workdir, environment
        self._spec, self._on_save = spec, on_save
        self._time = multihost.on_rank_0(lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
        self._has_environment = False
        self.resume(0, {})

    def resume(self, step: int, metadata: dict[str, Any]) -> list[str]:
        """Sets the checkpoint from which the run continues; all processes of a cluster must call this together.

        Args:
            step: of the checkpoint; 0 if there is none.
            metadata: of the checkpoint; {} if there is none.

        Returns:
            The options that may change and do: 'train.steps: 100 -> 200'.

        Raises:
            UserError: a file that is needed cannot be read.
        """
        self._step, self._before, new = step, None, self._config.to_dict()
        self._after = {"config": new, "changes": []}
        if not metadata:
            return []
        self._before = before = multihost.on_rank_0(lambda: self._read(step, metadata))
        changes = options.differences(options.complete(before["config"]), new, resume=("changeable",))
        self._after["changes"] = before["changes"]
        if changes and step:  # at step 0, no step was trained with other options
            self._after["changes"] = [*before["changes"], {"step": step, "time": self._time, "changes": changes}]
        return changes

    def _read(self, step: int, metadata: dict[str, Any]) -> dict[str, Any]:
        """Returns what `at` returns for the steps up to a checkpoint; older versions did not save all of it."""
        config = metadata.get("config") or run_files.read_config(self._workdir) or self._config.to_dict()
        return {"config": config, "changes": run_files.changes_until(self._workdir, step, metadata)}

    def at(self, step: int) -> dict[str, Any]:
        """Returns what the metadata of a checkpoint has: the `config` of its last step, and the `changes` until then.

        `changes` is a list of `{"step": S, "time": ..., "changes": [...]}`: from step S on, these options differ.
        """
        return self._after if self._before is None or step > self._step else self._before

    def write(self) -> None:
        """Writes the files as the run starts or resumes: nothing of a config with which no step was trained yet.

        Raises:
            UserError: a file cannot be written.
        """
        try:
            self._follow(self._step, self.at(self._step))
            initial_weights.record(self._workdir, self._config.checkpoint.init_from)
            if self._before is None or not (self._workdir / run_files.ENVIRONMENT).exists():
                self._write_environment()
        except OSError as error:
            raise UserError(
                f"{self._workdir} cannot be written to: {error.strerror}\n  free disk space or change its permissions"
            ) from error
        if self._spec is not None:
            input_spec.write(self._workdir, self._spec)

    def saved(self, step: int, metadata: dict[str, Any]) -> None:
        """Writes the files after a checkpoint is on disk; OSError if one cannot be written."""
        self._follow(step, metadata)
        if not self._has_environment:
            self._write_environment()
        if self._on_save is not None:
            self._on_save()

    def _follow(self, step: int, content: dict[str, Any]) -> None:
        summary = run_files.read_summary(self._workdir)
        if summary is not None and summary.get("steps") != step:
            atomic.remove(self._workdir / run_files.SUMMARY)
        run_files.write_config(self._workdir, content["config"], content["changes"])

    def _write_environment(self) -> None:
        atomic.write_json(self._workdir / run_files.ENVIRONMENT, self.environment)
        self._has_environment = True
