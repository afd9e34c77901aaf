"""The published sizes by name (arXiv 2010.11929, table 1; Ti and S as in arXiv 2106.10270): 'B/16' -> fields."""

import difflib
import re

SIZES = {
    "Ti": {"width": 192, "depth": 12, "heads": 3, "mlp_width": 768},
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "B": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
    "H": {"width": 1280, "depth": 32, "heads": 16, "mlp_width": 5120},
}


def fields(name: str) -> dict[str, int]:
    """The fields of `VisionTransformer` that a name such as 'Ti/16' stands for: any size with any patch size.

    Raises:
        ValueError: there is no such size, or the name is not of that form.
    """
    match = re.fullmatch(r"([A-Za-z]+)/([1-9][0-9]*)", name)
    if match is None or match[1] not in SIZES:
        near = difflib.get_close_matches(name.split("/")[0], SIZES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name!r} is no variant: a size ({', '.join(SIZES)}), a slash and a patch size, as '{near}/16'"
        )
    return {**SIZES[match[1]], "patch_size": int(match[2])}
