"""The trainer: optimizer, state, step, evaluation, checkpoints, records, and the loop that ties them together."""
