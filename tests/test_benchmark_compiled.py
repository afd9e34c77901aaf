"""The analysis of compiled programs in benchmarks/: kernels, bytes, FLOPs and predicted times."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import read_json_lines, run_command

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compiled
import costs
import devices
import hlo
import traces

from vit_jax.runtime import hardware

# The format of XLA for a GPU, shortened: the entry loops over an unknown number of steps, and a step loops three times.
PROGRAM = """
HloModule jit_update, is_scheduled=true

%fused_gather (param_0: u8[100,4], param_1: s32[8]) -> bf16[8,4] {
  %param_0 = u8[100,4]{1,0} parameter(0)
  %param_1 = s32[8]{0} parameter(1)
  %gather.1 = u8[8,4]{1,0} gather(%param_0, %param_1), offset_dims={1}, slice_sizes={1,4}
  ROOT %convert.1 = bf16[8,4]{1,0} convert(%gather.1), metadata={op_name="jit(update)/while/body/input/convert"}
}

%fused_update (param_2: f32[3,8,4], param_3: bf16[8,4], param_4: s32[]) -> f32[3,8,4] {
  %param_4 = s32[] parameter(2)
  %param_2 = f32[3,8,4]{2,1,0} parameter(0)
  %param_3 = bf16[8,4]{1,0} parameter(1)
  %convert.2 = f32[1,8,4]{2,1,0} convert(%param_3)
  ROOT %update.1 = f32[3,8,4]{2,1,0} dynamic-update-slice(%param_2, %convert.2, %param_4, %param_4, %param_4)
}

%fused_norm (param_5: bf16[8,4]) -> (bf16[8,4], f32[8]) {
  %param_5 = bf16[8,4]{1,0} parameter(0)
  %reduce.1 = f32[8]{0} reduce(%param_5), dimensions={1}, to_apply=%sum
  ROOT %tuple.1 = (bf16[8,4]{1,0}, f32[8]{0}) tuple(%param_5, %reduce.1)
}

%fused_dot (param_6: bf16[8,4], param_7: bf16[16,4]) -> bf16[8,16] {
  %param_6 = bf16[8,4]{1,0} parameter(0)
  %param_7 = bf16[16,4]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,16]{1,0} dot(%param_6, %param_7), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(update)/while/body/jvp(ViT)/mlp/up/dot_general"}
}

%body.3 (p: (bf16[8,4], f32[3,8,4], s32[])) -> (bf16[8,4], f32[3,8,4], s32[]) {
  %p = (bf16[8,4]{1,0}, f32[3,8,4]{2,1,0}, s32[]) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=0
  %all = f32[3,8,4]{2,1,0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=2
  %norm = (bf16[8,4]{1,0}, /*index=1*/f32[8]{0}) fusion(%x), kind=kLoop, calls=%fused_norm, metadata={op_name="jit(update)/while/body/jvp(ViT)/block_2/norm_mlp/mul"}
  %fusion-start.1 = ((f32[3,8,4]{2,1,0}, bf16[8,4]{1,0}, s32[]), f32[3,8,4]{2,1,0}, u32[]) fusion-start(%all, %x, %i), kind=kLoop, calls=%fused_update, metadata={op_name="jit(update)/while/body/transpose(jvp(ViT))/add"}
  %fusion-done.1 = f32[3,8,4]{2,1,0} fusion-done(%fusion-start.1)
  ROOT %tuple.2 = (bf16[8,4]{1,0}, f32[3,8,4]{2,1,0}, s32[]) tuple(%x, %fusion-done.1, %i)
}

%step.9 (s: (u8[100,4], s32[8], bf16[16,4], f32[64])) -> (u8[100,4], s32[8], bf16[16,4], f32[64]) {
  %s = (u8[100,4]{1,0}, s32[8]{0}, bf16[16,4]{1,0}, f32[64]{0}) parameter(0)
  %set = u8[100,4]{1,0} get-tuple-element(%s), index=0
  %rows = s32[8]{0} get-tuple-element(%s), index=1
  %kernel = bf16[16,4]{1,0} get-tuple-element(%s), index=2
  %moment = f32[64]{0} get-tuple-element(%s), index=3
  %images = bf16[8,4]{1,0} fusion(%set, %rows), kind=kLoop, calls=%fused_gather, metadata={op_name="jit(update)/while/body/input/convert"}
  %gemm_fusion = bf16[8,16]{1,0} fusion(%images, %kernel), kind=kCustom, calls=%fused_dot, backend_config={"kind":"__triton_gemm"}
  %cublas-gemm.1 = (bf16[2,8,16]{2,1,0}, s8[256]{0}) custom-call(%batched, %batched.1), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(update)/while/body/transpose(jvp(ViT))/block_0/attention/out/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  %batched = bf16[2,8,4]{2,1,0} bitcast(%images)
  %batched.1 = bf16[2,4,16]{2,1,0} bitcast(%images)
  %fmha = (bf16[8,4]{1,0}, f32[8]{0}, u8[0]{0}) custom-call(%images), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(update)/while/body/jvp(ViT)/block_0/attention/dot_product_attention_fwd"}
  %pallas_call.4 = bf16[8,4]{1,0} custom-call(%images, %images), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(update)/while/body/transpose(jvp(ViT))/block_0/attention/attention_backward/pallas_call"}, backend_config={ir = "ML\\\\EF(calls=%x"}
  %loop = (bf16[8,4]{1,0}, f32[3,8,4]{2,1,0}, s32[]) while(%carry), condition=%less, body=%body.3, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %moments = f32[64]{0} fusion(%moment), kind=kLoop, calls=%none, metadata={op_name="jit(update)/while/body/add"}
  %lost = f32[64]{0} copy(%moments)
  ROOT %tuple.3 = (u8[100,4]{1,0}, s32[8]{0}, bf16[16,4]{1,0}, f32[64]{0}) tuple(%set, %rows, %kernel, %lost)
}

ENTRY %main.1 (state: f32[64]) -> f32[64] {
  %state = f32[64]{0} parameter(0)
  %before = f32[64]{0} copy(%state)
  %while.1 = (u8[100,4]{1,0}, s32[8]{0}, bf16[16,4]{1,0}, f32[64]{0}) while(%before), condition=%continues, body=%step.9
  ROOT %after = f32[64]{0} get-tuple-element(%while.1), index=3
}
"""  # noqa: E501
IMAGES = 8 * 4 * 2
# Number of runs, bytes read and written, and FLOPs by kind, computed by hand.
EXPECTED = {
    "input": (1, 8 * 4 + 8 * 4 + IMAGES, 0),  # the rows that are gathered, their indices, the result
    "matmul, forward": (1, IMAGES + 16 * 4 * 2 + 8 * 16 * 2, 2 * 8 * 16 * 4),
    # cuBLAS's workspace, s8[256], is not counted.
    "matmul, backward": (1, 2 * 8 * 4 * 2 + 2 * 4 * 16 * 2 + 2 * 8 * 16 * 2, 2 * 2 * 8 * 16 * 4),
    "attention kernel, forward": (1, 2 * IMAGES + 8 * 4, 0),
    "attention kernel, backward": (1, 2 * IMAGES, 0),
    "elementwise, norm, forward": (3, 2 * IMAGES + 8 * 4, 0),
    "elementwise, other, backward": (3, IMAGES + 4 + 8 * 4 * 4, 0),  # one of three slices, updated in place
    "optimizer": (1, 2 * 64 * 4, 0),
    "elementwise, unnamed": (1, 2 * 64 * 4, 0),
}


def test_every_kernel_of_one_step_is_counted():
    found = costs.account(hlo.parse(PROGRAM))
    assert {one.kind: (one.count, one.bytes, one.flops) for one in found} == EXPECTED
    assert len(found) == len(EXPECTED)


def test_without_a_loop_over_steps_the_entry_is_the_step():
    body = PROGRAM[PROGRAM.index("%step.9") : PROGRAM.index("ENTRY")]
    text = PROGRAM[: PROGRAM.index("%step.9")] + f"ENTRY {body}"
    found = costs.account(hlo.parse(text))
    assert {one.kind: (one.count, one.bytes, one.flops) for one in found} == EXPECTED


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("f32[]", 4),
        ("bf16[2,3]{1,0}", 12),
        ("(f32[8]{0}, (pred[5], s8[2,2]{1,0:T(8,128)}), /*index=2*/u32[])", 32 + 5 + 4 + 4),
        ("f8e4m3fn[16]", 16),
        ("s4[16]", 8),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_type(shape, expected):
    assert hlo.size(shape) == expected


def test_a_program_compiled_by_jax_is_parsed():
    def step(x, kernel):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ kernel), x).sum()

    text = jax.jit(step).lower(jnp.zeros((6, 8)), jnp.zeros((8, 8))).compile().as_text()
    program = hlo.parse(text)
    shapes = {name: one.shape for name, one in program.named().items()}
    matmuls = [hlo.matmul(program, one, shapes) for one in program.named().values() if one.opcode == "dot"]
    assert [sorted(dims) for dims in matmuls] == [[1, 6, 8, 8]]
    assert max(times for _, times in hlo.kernels(program, program.entry)) == 5


def test_the_time_of_kernels_follows_from_flops_or_bytes():
    device = devices.DEVICES["H200"]
    matmul = costs.Kernel("matmul, forward", "", 2, 10, 620 * 10**9, 384)
    narrow = costs.Kernel("matmul, backward", "", 1, 4 * 10**9, 1, 8)
    attention = costs.Kernel("attention kernel, forward", "", 12, 10**9, 0, 0)
    rows = costs.price([matmul, narrow, attention], device, 989e12, {"forward": 3.5, "backward": 9.0})
    assert {kind: (row.count, row.bytes, pytest.approx(row.ms)) for kind, row in rows.items()} == {
        "attention kernel, forward": (12, 12 * 10**9, 3.5),
        "matmul, forward": (2, 20, 2.0),
        "matmul, backward": (1, 4 * 10**9, 1.0),
    }
    assert next(iter(rows)) == "attention kernel, forward"


def test_attention_of_the_measured_step_is_predicted():
    # B/16 at 224 pixels, 200 tokens, batch 256 by cuDNN: 13.9 of the step's 71.8 ms.
    rates = costs.attention_rates("cudnn", 200, 989e12)
    assert sum(costs.attention_ms(2 * 256 * 200**2 * 768, rates, 12, 12).values()) == pytest.approx(13.9, abs=0.05)


@pytest.mark.parametrize("size, expected", [(10, 0.2), (65, 0.2), (113.16, 0.3), (197, 0.4), (1000, 0.4)])
def test_shares_are_interpolated_between_measured_sizes(size, expected):
    assert costs.at({65: 0.2, 197: 0.4}, size) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", devices.DEVICES)
def test_the_peak_of_described_devices_is_known(name):
    device = devices.DEVICES[name]
    assert name in device.name and hardware.peak(device.name) is not None
    assert device.shared_per_block < device.shared_per_core <= device.l2 < device.memory
    # From cores and clock: dense bfloat16 FLOPs per clock and core are powers of two on every one of them.
    per_core = hardware.peak(device.name) / device.cores / device.clock / 1e9
    assert per_core == pytest.approx(
        {8: 2048, 9: 4096, 10: 8192}[device.capability[0]] / (2 if name == "L40S" else 1), rel=0.1
    )
    text = device.target_config()
    assert f"core_count: {device.cores} " in text and f'device_description_str: "{device.name}"' in text
    assert text.count("{") == text.count("}")


def test_without_the_cuda_plugin_it_explains_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "PLUGINS", ("no_such_plugin",))
    with pytest.raises(SystemExit) as raised:
        compiled.main([])
    assert raised.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) <= 3
    assert all(
        text in " ".join(error) for text in ('pip install "jax[cuda13]"', "SKIP_CUDA_CONSTRAINTS", "JAX_PLATFORMS")
    )


def test_pallas_kernels_are_attention_in_profiles():
    kinds = traces.kinds(PROGRAM)
    assert kinds["pallas_call.4"] == kinds["fmha"] == "attention"


@pytest.mark.slow
@pytest.mark.parametrize("step", ["bare", "trainer"])
def test_a_small_step_is_compiled_for_a_described_gpu(step):
    if not any(importlib.util.find_spec(name) for name in compiled.PLUGINS):
        pytest.skip("JAX's CUDA plug-in is not installed")
    small = ["--variant=Ti/8", "--image_size=32", "--batch_size=16", "--classes=10", '--fields={"depth": 2}']
    output = run_command(Path(compiled.__file__), *small, "--kernel=pallas", f"--step={step}", "--json")
    line = read_json_lines(output)[-1]
    assert line["kernels"] > 20
    assert line["step_ms"] == pytest.approx(sum(line["ms"].values()), abs=0.01)
    assert {"matmul, forward", "attention kernel, backward", "optimizer"} <= set(line["ms"])
    assert ("input" in line["ms"]) == (step == "trainer")
