"""What the benchmarks make of what they measured: profiles as tables of kinds of work, and results as Markdown."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import table
import traces

# As XLA writes it, shortened: a product with its bias in one fusion, scores, a norm, an update, a call of a library.
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


def test_instructions_have_the_kind_of_what_they_compute():
    found = traces.kinds(PROGRAM)
    assert {name: found[name] for name in KINDS} == KINDS


def event(name, start, length, process=1, thread=1):
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "ts": start,
        "dur": length,
        "name": name,
        "args": {"hlo_op": name},
    }


def named(what, name, process=1, thread=0):
    return {"ph": "M", "pid": process, "tid": thread, "name": what, "args": {"name": name}}


def test_the_kinds_of_a_trace_add_up_to_the_step():
    # Two steps inside a loop: the loop's own time is what its instructions leave, and 300 us pass between the steps.
    events = [named("process_name", "/host:CPU"), {"ph": "X", "pid": 1, "tid": 2, "ts": 0, "dur": 9999, "name": "main"}]
    for start in (1000, 2300):
        events += [event("while.1", start, 1000), event("add_fusion", start + 10, 400)]
        events += [
            event("dot.7", start + 410, 200),
            event("norm", start + 610, 150),
            event("moments", start + 760, 100),
        ]
        events += [event("crop", start + 860, 40)]
    made = traces.breakdown(events, KINDS | {"while.1": "elementwise"}, steps=2)
    assert made == {
        "matmul": 0.4,
        "attention": 0.2,
        "elementwise": 0.15 + 0.11,
        "optimizer": 0.1,
        "input": 0.04,
        "communication": 0.0,
        "idle": 0.15,
        "step": 1.15,
    }


def test_of_an_accelerator_the_streams_count_and_no_line_that_shows_them_again():
    events = [named("process_name", "/device:GPU:0", 7), named("thread_name", "Stream #13(Compute)", 7, 13)]
    events += [named("thread_name", "XLA Ops", 7, 99), named("process_name", "/host:CPU", 1)]
    events += [event("add_fusion", 0, 100, 7, 13), event("add_fusion", 0, 100, 7, 99), event("x", 0, 5000)]
    events += [{**event("MemcpyH2D", 200, 50, 7, 14), "args": {}}, named("thread_name", "Stream #14(MemcpyH2D)", 7, 14)]
    made = traces.breakdown(events, KINDS, steps=1)
    assert (made["matmul"], made["input"], made["idle"], made["step"]) == (0.1, 0.05, 0.1, 0.25)


def test_what_is_inside_another_event_counts_once():
    events = [event("a", 0, 100), event("b", 10, 30), event("c", 20, 10), event("d", 50, 50), event("e", 100, 10)]
    own = {found["name"]: time for found, time in traces.own_times(events)}
    assert own == {"a": 20, "b": 20, "c": 10, "d": 50, "e": 10}
    assert traces.busy([*events, event("f", 150, 5, thread=2)]) == (115, 155)


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

| arithmetic | width | ms | TFLOP/s |
| --- | --- | --- | --- |
| bfloat16 | 192 | 0.1235 | 12.3 |"""


def test_results_become_tables_between_the_two_lines_of_a_page(tmp_path):
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


def test_a_page_without_the_lines_gets_them_at_its_end(tmp_path):
    results, page = tmp_path / "chip.json", tmp_path / "page.md"
    results.write_text(json.dumps({"device": "chip", "lines": LINES}))
    page.write_text("Before.\n")
    table.put(results, page)
    text = page.read_text()
    assert text == f"Before.\n\n<!-- results: chip -->\n\n{SHOWN}\n\n<!-- end of results: chip -->\n"


@pytest.mark.parametrize("value, shown", [(None, ""), (0.5, "0.5"), (1234.5, "1,234"), ({"a": 0.25, "b": 0}, "a 0.25")])
def test_cells(value, shown):
    assert table.cell(value) == shown
