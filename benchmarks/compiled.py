"""Compiles a training step for a GPU on a machine without one, and predicts the time of its kernels.

    python benchmarks/compiled.py --variant=B/16 --image_size=224 --batch_size=256 --fields='{"registers": 3}'
    python benchmarks/compiled.py --device=A100 --variant=S/4 --image_size=32 --classes=10 --batch_size=1024 \\
        --kernel=pallas --json

XLA compiles for a described device (benchmarks/devices.py). Fusions, layouts, copies and memory are those of the real
device; matmuls and cuDNN's attention are library calls, which do not run, and nothing is autotuned. The time of each
kernel of one step is predicted from the bytes that it reads and writes and from its FLOPs:

* matmuls from FLOPs, at rates measured on an H200 (620 TFLOP/s if the smallest dimension is 384, 715 at 768);
* attention kernels from FLOPs, at rates measured there for numbers of tokens;
* all others, and matmuls for which this takes longer, from bytes, at 83 % of the memory bandwidth.

Of five steps that were also measured on an H200, four are predicted within 3 % and one 6 % too low
(docs/compiled_step.md). Launch overhead is not included: small models, whose kernels are shorter than a launch, are
slower than predicted. Other devices are assumed to reach the same shares of peak and bandwidth.

Needs JAX's CUDA plug-in, but no driver and no GPU. --step=trainer is the step of `python -m vit_jax.main` (one
iteration of its loop) without augmentation; --step=bare is forward pass, backward pass and AdamW.
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import costs
import devices
import hlo
from costs import ATTENTION_KERNEL, Kernel, Row

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
MISSING = """\
error: JAX's CUDA plug-in is not installed; XLA needs it to compile for a GPU (no GPU is needed)
  install it in a separate environment: pip install "jax[cuda13]" -r requirements.txt
  then run this with that Python (JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 and JAX_PLATFORMS=cpu are set here)"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="H200", choices=list(devices.DEVICES), help="(default: %(default)s)")
    add("--variant", default="B/16", help="size and patch size (default: %(default)s)")
    add("--image_size", type=int, default=224, help="height and width in pixels (default: %(default)s)")
    add("--batch_size", type=int, default=256, help="images per step (default: %(default)s)")
    add("--classes", type=int, default=1000, help="(default: %(default)s)")
    known = ("plain", "heads_first", "cudnn", "pallas", "pallas_two_pass_64", "pallas_two_pass_32")
    add("--kernel", default="cudnn", choices=known, help="config.model.attention_kernel (default: %(default)s)")
    add("--fields", type=json.loads, default={}, help="more options of config.model, as JSON")
    add("--step", default="trainer", choices=["trainer", "bare"], help="(default: %(default)s)")
    add("--attention_tflops", help="FORWARD,BACKWARD rates of the attention kernel instead of the measured ones")
    add("--triton_gemm", action="store_true", help="allow XLA to compile matmuls with Triton")
    add("--hlo", type=Path, help="file for the text of the compiled program")
    add("--top", type=int, default=12, help="number of kernels to list, by bytes moved (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON line instead of tables")
    return parser.parse_args(arguments)


def prepare(flags: argparse.Namespace) -> None:
    """Sets the environment variables that XLA reads; must run before JAX is imported."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    options = ["--xla_gpu_autotune_level=0"]
    if (toolkit := cuda_directory()) is not None:
        options.append(f"--xla_gpu_cuda_data_dir={toolkit}")
    if not flags.triton_gemm:
        options.append("--xla_gpu_enable_triton_gemm=false")
    os.environ["XLA_FLAGS"] = " ".join([*options, os.environ.get("XLA_FLAGS", "")])


def cuda_directory() -> Path | None:
    """The directory with CUDA's libdevice: of an installed package or of a CUDA installation."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(location) for location in spec.submodule_search_locations] if spec else []
    found = [path for package in packages for path in sorted(package.glob("cu1*")) + [package / "cuda_nvcc"]]
    found += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    return next((path for path in found if (path / "nvvm" / "libdevice").is_dir()), None)


def compile_step(flags: argparse.Namespace) -> tuple[Any, Any, float]:
    """The compiled step, the model, and the seconds of compilation."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    from vit_jax import config as options
    from vit_jax.training import build_model

    fused_attention_stablehlo.check_cudnn_version = lambda: 91000  # no cuDNN is installed
    target = devices.DEVICES[flags.device].target_config()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices).reshape(1), ("data",), axis_types=(AxisType.Auto,))
    section = options.default().model
    section.update(variant=flags.variant, **flags.fields)
    model = build_model.build(section, flags.classes, dtype=jnp.bfloat16).clone(attention_kernel=flags.kernel)
    function, arguments = {"bare": bare_step, "trainer": trainer_step}[flags.step](flags, model, mesh)
    began = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas finds the device there
        compiled = function.lower(*arguments).compile()
    return compiled, model, time.perf_counter() - began


def on(mesh: Any, tree: Any) -> Any:
    """The abstract arrays of a tree, replicated over a mesh."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), tree)


def bare_step(flags: argparse.Namespace, model: Any, mesh: Any) -> tuple[Any, tuple]:
    """Forward pass, backward pass and AdamW on images in the compute dtype; and its abstract arguments."""
    import jax
    import jax.numpy as jnp
    import jax_sides
    import optax
    import work as works

    from vit_jax.training import setup

    size = (flags.image_size, flags.image_size, 3)
    optimizer = optax.adamw(works.LEARNING_RATE, *works.BETAS, works.EPSILON, weight_decay=works.WEIGHT_DECAY)
    parameters = jax.eval_shape(lambda: setup.init_parameters(model, size, 0))
    abstract_state = (parameters, jax.eval_shape(optimizer.init, parameters))
    images = jax.ShapeDtypeStruct((flags.batch_size, *size), model.dtype)
    targets = jax.ShapeDtypeStruct((flags.batch_size, flags.classes), jnp.float32)
    return jax.jit(jax_sides.make_step(model, optimizer), donate_argnums=0), on(mesh, (abstract_state, images, targets))


def trainer_step(flags: argparse.Namespace, model: Any, mesh: Any) -> tuple[Any, tuple]:
    """The update of the trainer, a loop over steps; and its abstract arguments."""
    import jax_sides
    import numpy as np
    from work import Work

    from vit_jax.models import variants
    from vit_jax.training.step import make_update

    fields = {
        name: variants.fields(flags.variant)[name] for name in ("width", "depth", "heads", "mlp_width", "patch_size")
    }
    sizes = {"image_size": flags.image_size, "classes": flags.classes, "batch_size": flags.batch_size}
    experiment = jax_sides.experiment_of(Work("ours_trainer", "train", dtype="bfloat16", **fields, **sizes), model)
    feed = experiment.pipelines["train"].abstract_feed(jax_sides.ROWS, flags.batch_size)
    experiment = dataclasses.replace(experiment, mesh=mesh)
    return make_update(experiment), (experiment.abstract_state(), on(mesh, feed), np.int32(0), np.int32(0))


def attention_ms(flags: argparse.Namespace, model: Any, kernels: list[Kernel], peak: float) -> dict[str, float]:
    """Milliseconds of all attention kernels of the step, by pass."""
    from vit_jax.models.vit import token_grid

    rows, columns = token_grid(model, (flags.image_size, flags.image_size))
    tokens = rows * columns + model.class_token + model.registers
    overrides = [1e12 * float(rate) for rate in (flags.attention_tflops or "").split(",") if rate]
    rates = overrides or costs.attention_rates(flags.kernel, tokens, peak)
    runs = sum(one.count for one in kernels if one.kind == f"{ATTENTION_KERNEL}, forward")
    return costs.attention_ms(2 * flags.batch_size * tokens**2 * model.width, rates, runs, model.depth)


def summary(flags: argparse.Namespace, model: Any, rows: dict[str, Row], temporary: int, peak: float) -> dict[str, Any]:
    """The JSON line: predictions for the whole step."""
    from vit_jax.models.summary import forward_flops

    step = sum(row.ms for row in rows.values())
    rate = 1e3 * flags.batch_size / step
    rest = [row.bytes for kind, row in rows.items() if not kind.startswith(("matmul", ATTENTION_KERNEL))]
    options = ("variant", "image_size", "batch_size", "kernel", "fields", "step")
    return {
        "benchmark": "compiled",
        "compiled_for": devices.DEVICES[flags.device].name,
        **{name: getattr(flags, name) for name in options},
        "step_ms": round(step, 2),
        "images_per_second": round(rate, 1),
        "mfu": round(3 * forward_flops(model, (flags.image_size, flags.image_size), 3) * rate / peak, 4),
        "kernels": sum(row.count for row in rows.values()),
        "other_gb": round(sum(rest) / 1e9, 1),
        "temporary_gib": round(temporary / 2**30, 1),
        "ms": {kind: round(row.ms, 3) for kind, row in rows.items()},
        "gb": {kind: round(row.bytes / 1e9, 2) for kind, row in rows.items()},
    }


def show(line: dict[str, Any], rows: dict[str, Row], kernels: list[Kernel], top: int) -> None:
    """Prints the tables."""
    title = f"{line['variant']}, {line['image_size']} px, batch {line['batch_size']}, {line['step']} step"
    print(f"{line['compiled_for']}: {title}, attention by {line['kernel']}")
    print(f"{'kernels':>7}  {'GB':>7}  {'ms':>7}  kind")
    for kind, row in rows.items():
        print(f"{row.count:7d}  {row.bytes / 1e9:7.2f}  {row.ms:7.2f}  {kind}")
    print(f"{line['kernels']:7d}  {sum(row.bytes for row in rows.values()) / 1e9:7.2f}  {line['step_ms']:7.2f}  all")
    print(
        f"\nneither matmuls nor attention kernels: {line['other_gb']} GB; temporary memory: {line['temporary_gib']} GiB"
    )
    print(f"predicted: {line['step_ms']} ms per step, {line['images_per_second']:,.0f} images/s, MFU {line['mfu']:.1%}")
    origins: collections.Counter[str] = collections.Counter()
    for one in kernels:
        if not one.kind.startswith(("matmul", ATTENTION_KERNEL)):
            origins[one.origin] += one.count * one.bytes
    print("\nthe largest of these:")
    for origin, total in origins.most_common(top):
        print(f"{total / 1e9:7.2f} GB  {origin[:200]}")


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        print(MISSING, file=sys.stderr)
        raise SystemExit(2)
    prepare(flags)
    from vit_jax.runtime import hardware

    device = devices.DEVICES[flags.device]
    peak = hardware.peak(device.name)
    try:
        compiled, model, seconds = compile_step(flags)
    except NotImplementedError as error:
        raise SystemExit(f"error: this step cannot be compiled for {device.name}: {error}") from None
    text = compiled.as_text()
    if flags.hlo:
        flags.hlo.write_text(text)
    kernels = costs.account(hlo.parse(text))
    rows = costs.price(kernels, device, peak, attention_ms(flags, model, kernels, peak))
    line = summary(flags, model, rows, compiled.memory_analysis().temp_size_in_bytes, peak)
    line["compile_s"] = round(seconds, 1)
    if flags.json:
        print(json.dumps(line), flush=True)
    else:
        show(line, rows, kernels, flags.top)


if __name__ == "__main__":
    main(sys.argv[1:])
