"""The output of the benchmarks: profiles as times by kind of work, and results as Markdown tables."""

import itertools
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import table
import traces

# The format of XLA, shortened: a matmul fused with its bias, attention scores, a norm, an update, calls of libraries.
PROGRAM = """
HloModule jit_update, is_scheduled=true

%fused_dot (param_0: f32[8,4], param_1: f32[4,4]) -> f32[8,4] {
  %dot.3 = f32[8,4]{1,0} dot(%param_0, %param_1), metadata={op_name="jit(update)/jvp(ViT)/encoder/block_0/mlp/up/dot_general"}
  ROOT %add.1 = f32[8,4]{1,0} add(%dot.3, %dot.3), metadata={op_name="jit(update)/jvp(ViT)/encoder/block_0/mlp/up/add"}
}

ENTRY %main.9 (state: f32[8,4]) -> f32[8,4] {
  %add_fusion = f32[8,4]{1,0} fusion(%state), kind=kOutput, calls=%fused_dot, metadata={op_name="jit(update)/jvp(ViT)/encoder/block_0/mlp/up/add"}
  %dot.7 = f32[2,4,4]{2,1,0} dot(%a, %b), metadata={op_name="jit(update)/transpose(jvp(ViT))/encoder/block_0/block_0._attention/attention/bqhd,bkhd->bhqk/dot_general"}
  %softmax = f32[2,4,4]{2,1,0} fusion(%dot.7), kind=kLoop, calls=%none, metadata={op_name="jit(update)/jvp(ViT)/encoder/block_0/attention/exp"}
  %custom-call.2 = (bf16[8,4]{1,0}, s8[4]{0}) custom-call(%c), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(update)/jvp(ViT)/encoder/block_0/attention/qkv/dot_general"}
  %fmha = (bf16[8,4]{1,0}, s8[4]{0}) custom-call(%c), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(update)/jvp(ViT)/encoder/block_0/attention/x"}
  %norm = f32[8,4]{1,0} fusion(%state), kind=kLoop, calls=%none, metadata={op_name="jit(update)/jvp(ViT)/encoder/block_0/norm_attention/mul"}
  %moments = f32[8,4]{1,0} fusion(%state), kind=kLoop, calls=%none, metadata={op_name="jit(update)/while/body/mul"}
  %crop = u8[8,4]{1,0} fusion(%state), kind=kLoop, calls=%none, metadata={op_name="jit(update)/while/body/input/gather"}
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%norm), to_apply=%sum, metadata={op_name="jit(update)/transpose(jvp(ViT))/add"}
  ROOT %while.1 = f32[8,4]{1,0} while(%state), condition=%c, body=%b
}
"""  # noqa: E501
KINDS = {
    "add_fusion": "matmul",
    "dot.7": "attention",
    "softmax": "attention",
    "custom-call.2": "matmul",
    "fmha": "attention",
    "norm": "elementwise",
    "moments": "optimizer",
    "crop": "input",
    "all-reduce.1": "communication",
}


def test_instructions_are_classified_by_what_they_compute():
    found = traces.kinds(PROGRAM)
    assert {name: found[name] for name in KINDS} == KINDS


def event(name, start, length, process=1, thread=1, **arguments):
    times = {"ph": "X", "pid": process, "tid": thread, "ts": start, "dur": length}
    return {**times, "name": name, "args": arguments or {"hlo_op": name}}


def metadata(kind, name, process=1, thread=0):
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}}


def kinds_of(events, steps=1):
    """The times that are not 0, which add up to the step, and how the kinds are known."""
    table, attributed = traces.breakdown(events, KINDS | {"while.1": "elementwise"}, steps)
    step = table.pop("step")
    assert sum(table.values()) == pytest.approx(step, rel=1e-3)
    assert min(table.values()) >= 0
    return {name: value for name, value in table.items() if value} | {"step": step}, attributed


def test_the_kinds_of_a_trace_add_up_to_the_step():
    # Two steps in a loop: the loop itself gets the time outside of its instructions; 300 us pass between the steps.
    events = [
        metadata("process_name", "/host:CPU"),
        {"ph": "X", "pid": 1, "tid": 2, "ts": 0, "dur": 9999, "name": "main"},
    ]
    for start in (1000, 2300):
        events += [event("while.1", start, 1000), event("add_fusion", start + 10, 400)]
        events += [
            event("dot.7", start + 410, 200),
            event("norm", start + 610, 150),
            event("moments", start + 760, 100),
        ]
        events += [event("crop", start + 860, 40)]
    found, attributed = kinds_of(events, steps=2)
    assert found == {
        "matmul": 0.4,
        "attention": 0.2,
        "elementwise": 0.15 + 0.11,
        "optimizer": 0.1,
        "input": 0.04,
        "idle": 0.15,
        "step": 1.15,
    }
    assert attributed == {"program": 1, "name": 0, "none": 0}


def gpu_trace(*events, streams=(13, 14, 15)):
    """Events in the format of the profiler for a GPU: on streams, and again on lines that are derived from these."""
    names = {13: "Stream #13(Memset,MemcpyD2D,Compute)", 14: "Stream #14(MemcpyH2D)", 15: "Stream #15(Compute)"}
    names |= {16: "CUPTI overhead"}
    trace = [metadata("process_name", "/host:CPU", 1), event("ThunkExecutor", 0, 1e6)]
    trace += [metadata("process_name", "/device:GPU:0", 7), *(metadata("thread_name", names[k], 7, k) for k in streams)]
    for thread, name in enumerate(("XLA Modules", "XLA Ops", "Framework Ops", "Source code"), 90):
        trace += [metadata("thread_name", name, 7, thread), event("add_fusion", 0, 1e6, 7, thread)]
    return [*trace, *events, {}]  # the profiler writes an empty event at the end


def test_only_the_streams_of_a_gpu_count():
    copy = event("MemcpyH2D", 200, 50, 7, 14, memcpy_details="kind_src:pinned size:64")
    found, attributed = kinds_of(gpu_trace(event("add_fusion", 0, 100, 7, 13), copy))
    assert found == {"matmul": 0.1, "input": 0.05, "idle": 0.1, "step": 0.25}
    assert attributed == {"program": 0.6667, "name": 0.3333, "none": 0}


def test_consecutive_kernels_get_their_own_time():
    # In floating point, about every third of these starts before its predecessor ends, as if it were nested.
    kernels, start = [], 0.1
    for k in range(200):
        length = round((30.7, 9.1)[k % 2] + 0.1 * (k % 7), 3)
        kernels.append(event(("add_fusion", "norm")[k % 2], round(start, 3), length, 7, 13))
        start += length
    assert any(a["ts"] + a["dur"] > b["ts"] for a, b in itertools.pairwise(kernels))
    found, _ = kinds_of(gpu_trace(*kernels))
    lengths = [sum(one["dur"] for one in kernels if one["name"] == name) / 1e3 for name in ("add_fusion", "norm")]
    assert found == {"matmul": pytest.approx(lengths[0]), "elementwise": pytest.approx(lengths[1]), "step": 4.0394}


def test_concurrent_kernels_share_the_time():
    # 100 us on each of two streams, half of it at once; and a kernel that starts before its predecessor has ended.
    kernels = [event("add_fusion", 0, 100, 7, 13), event("norm", 50, 100, 7, 15), event("moments", 140, 20, 7, 15)]
    found, _ = kinds_of(gpu_trace(*kernels))
    assert found == {"matmul": 0.075, "elementwise": 0.07, "optimizer": 0.015, "step": 0.16}


def test_kernels_of_a_cuda_graph_are_classified_by_name():
    graph = event("CudaGraphExec:3", 0, 500, 7, 15, cuda_graph_exec_id=3, hlo_op="add_fusion")
    by_name = {
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNT": "matmul",
        "cutlass_80_wmma_tensorop_bf16_s161616gemm": "matmul",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x64_4x1x1": "attention",
        "attention_backward": "attention",
        "input_reduce_fusion_2": "elementwise",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
        "void (anonymous namespace)::k<4>(int)": "unattributed",
    }
    kernels = [
        event(name, 10 + 60 * index, 60, 7, 13, correlation_id=9, cuda_graph_node_id=index, hlo_op="dot.7")
        for index, name in enumerate(by_name)
    ]
    found, attributed = kinds_of(gpu_trace(graph, *kernels))
    expected = {"matmul": 0.12, "attention": 0.12, "elementwise": 0.06, "communication": 0.06}
    # The launch itself counts where no kernel runs, before and after them.
    assert found == expected | {"unattributed": 0.06 + 0.08, "step": 0.5}
    assert attributed == {"program": 0, "name": 0.72, "none": 0.28}


def test_a_launch_of_a_cuda_graph_alone_is_unattributed():
    found, attributed = kinds_of(gpu_trace(event("CudaGraphExec:3", 0, 500, 7, 13, cuda_graph_exec_id=3)))
    assert found == {"unattributed": 0.5, "step": 0.5}
    assert attributed["none"] == 1


def test_a_stream_with_overhead_of_the_profiler_counts():
    events = [event("BUFFER_FLUSH", 0, 40, 7, 16, id=1), event("add_fusion", 50, 100, 7, 16)]
    found, _ = kinds_of(gpu_trace(*events, event("MemoryAlloc", 0, 100, 7, 13, bytes=1), streams=(13, 16)))
    assert found == {"matmul": 0.1, "step": 0.1}


@pytest.mark.parametrize(
    "instruction, kernel, kind",
    [
        ("dot.7", "nvjet_x", "attention"),
        ("add_fusion.clone.1", "x", "matmul"),
        ("wrapped_norm", "x", "elementwise"),
        ("while.1::crop", "x", "input"),
        ("all-reduce.1.clone", "x", "communication"),
        ("", "custom_call_2", "matmul"),
        ("gone", "memset", "elementwise"),
        ("gone", "x", "unattributed"),
        ("gemm_gone", "x", "matmul"),
        ("command_buffer_4", "loop_multiply_fusion_3", "elementwise"),
    ],
)
def test_names_in_a_trace_are_matched_with_the_program(instruction, kernel, kind):
    attribute = traces.Attribution(KINDS)
    assert attribute({"name": kernel, "args": {"hlo_op": instruction}})[0] == kind


def test_nested_events_count_once():
    events = [event("a", 0, 100), event("b", 10, 30), event("c", 20, 10), event("d", 50, 50), event("e", 100, 10)]
    assert traces.own_times(events, nested=True) == [20, 20, 10, 50, 10]
    # Another thread at the same time: the innermost events share the time.
    assert traces.own_times([*events, event("f", 90, 20, thread=2)], nested=True) == [20, 20, 10, 45, 5, 10]


LINES = [
    {"benchmark": "matmul", "device": "A Chip (1)", "dtype": "bfloat16", "width": 192, "ms": 0.123456, "tflops": 12.3},
    {"benchmark": "train_step", "name": "ours", "variant": "B/16", "batch_size": 256, "images_per_second": 12345.6},
    {"benchmark": "train_step", "name": "timm", "variant": "B/16", "batch_size": 256, "error": "no | such"},
]
SHOWN = """\
**train_step**

| model | batch | side | images/s | error |
| --- | --- | --- | --- | --- |
| B/16 | 256 | ours | 12,346 |  |
| B/16 | 256 | timm |  | no / such |

**matmul**

| compute dtype | width | ms | TFLOP/s |
| --- | --- | --- | --- |
| bfloat16 | 192 | 0.1235 | 12.3 |"""


def test_results_become_tables_between_the_markers_of_a_page(tmp_path):
    source, page = tmp_path / "lines", tmp_path / "page.md"
    source.write_text("noise\n" + "\n".join(json.dumps(line) for line in LINES))
    results = table.collect(source, tmp_path / "results")
    assert results.name == "a-chip-1.json"
    page.write_text("Before.\n\n<!-- results: a-chip-1 -->\nold\n<!-- end of results: a-chip-1 -->\n\nAfter.\n")
    for _ in range(2):
        table.put(results, page)
        text = page.read_text()
        assert text == (
            f"Before.\n\n<!-- results: a-chip-1 -->\n\n{SHOWN}\n\n<!-- end of results: a-chip-1 -->\n\nAfter.\n"
        )


def test_a_page_without_markers_gets_them_at_its_end(tmp_path):
    results, page = tmp_path / "chip.json", tmp_path / "page.md"
    results.write_text(json.dumps({"device": "chip", "lines": LINES}))
    page.write_text("Before.\n")
    table.put(results, page)
    text = page.read_text()
    assert text == f"Before.\n\n<!-- results: chip -->\n\n{SHOWN}\n\n<!-- end of results: chip -->\n"


@pytest.mark.parametrize(
    "value, shown", [(None, ""), (0.5, "0.5"), (1234.5, "1,234"), ({"a": 0.25, "b": 0}, "a 0.25"), (True, "yes")]
)
def test_cells(value, shown):
    assert table.cell(value) == shown
