"""The former name of `python -m vit_jax.preview`, kept for existing command lines."""

import runpy

if __name__ == "__main__":
    runpy.run_module("vit_jax.preview", run_name="__main__", alter_sys=True)
