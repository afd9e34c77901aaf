"""A config made complete by the parameters that it starts from."""

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.errors import UserError


def take_model(config: ConfigDict) -> None:
    """Puts the model of `checkpoint.init_from` into the config where `model.variant` asks for that.

    What the config has at its default is taken from the file; what was set otherwise stays, and whether it goes with
    the file's parameters is seen when they are loaded. So is `data.normalization`.

    Raises:
        UserError: the file cannot be read, or no config describes its model.
    """
    # The config is not checked yet, and may lack whole sections.
    value = lambda section, key: config.get(section, {}).get(key)  # noqa: E731
    source = value("checkpoint", "init_from")
    if source is None or options.INIT_FROM not in (value("model", "variant"), value("data", "normalization")):
        return
    from vit_jax import weights
    from vit_jax.models import variants

    told = {"heads": config.model.heads} if config.model.heads is not None else {}
    description = weights.recognise(source, **told)
    if config.data.normalization == options.INIT_FROM:
        config.data.normalization = description.normalization
    if config.model.variant != options.INIT_FROM:
        return
    try:
        found = variants.options_of(description.model)
    except ValueError as error:
        raise UserError(f"config.checkpoint.init_from is {source}: {error}") from None
    config.model.variant = found.pop("variant")
    if found["pooling"] == "none":  # the head that read every token goes
        found["pooling"] = options.OPTIONS["model"]["pooling"].default
    for key, value in found.items():
        if config.model[key] == options.OPTIONS["model"][key].default:
            config.model[key] = value
