import itertools
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import corpora, kernels, report
from benchmarks.cases import LOSS_CASES, LOSS_CASES_2
from benchmarks.test_bench_loss import fused, gather_first, published, replayed
from d2v_fast.data.vision import ImageData
from d2v_fast.masking import RandomMask


def results(path, test, *infos, **about):
    machine = dict(cpu=dict(brand_raw="a processor"), threads=2, torch="2.13.0") | about
    entries = [dict(name=f"{test}[{i}]", extra_info=info) for i, info in enumerate(infos)]
    path.write_text(json.dumps(dict(benchmarks=entries, machine_info=machine, commit_info=dict(id="0123456789"))))
    return path


def loss_row(factor=1.0):
    seconds = {"fused": 1e-3, "eager": 2e-2 * factor, "compile": 5e-3, "gather first": 4e-3, "gather first, compile": 3e-3}
    return dict(
        case="text",
        dtype="float32",
        bytes=10**7,
        gradient_bytes=10**6,
        copy_bandwidth=2e10,
        row_bandwidth=1e10,
        seconds=seconds,
        seconds_reused={name: value / 2 for name, value in seconds.items()},
        extra_bytes=dict.fromkeys(seconds, 10**6),
    )


def step_row(factor=1.0):
    seconds = {"today": 4.0 * factor, "an hour's work": 1.5, "fused": 1.0}
    parts = ("embed", "teacher", "student", "head", "loss", "backward", "optimizer", "EMA", "step")
    return dict(
        case="speech",
        samples=8,
        targets=100,
        matmul_rate=1e12,
        seconds=seconds,
        flops=dict.fromkeys(seconds, 5e11),
        extra_bytes=dict.fromkeys(seconds, 2**30),
        parts={"fused": {part: i / 10 for i, part in enumerate(parts)}},
    )


def step_2_row(factor=1.0):
    """Four times the targets in twice the time: 2 × a target."""
    seconds = {"1.0 today": 1.0 * factor, "fused": 2.0}
    return dict(case="image", targets={"1.0 today": 25, "fused": 100}, seconds=seconds)


@pytest.mark.parametrize(
    "test, row, sentences",
    [
        ("test_loss", loss_row, [f"text float32{how}: 16.80 × eager, committed 20.00, limit 17.00" for how in ("", " reused")]),
        ("test_step", step_row, ["speech: 3.36 × today, committed 4.00, limit 3.40"]),
        ("test_step_2", step_2_row, ["image: 1.68 × 1.0 today, committed 2.00, limit 1.70"]),
    ],
)
def test_the_gate_fails_on_a_ratio_that_fell_by_more_than_15_percent(test, row, sentences, tmp_path):
    old = results(tmp_path / "old.json", test, row())
    assert report.regressions(results(tmp_path / "same.json", test, row(0.86)), old) == []
    assert report.regressions(results(tmp_path / "slow.json", test, row(0.84)), old) == sentences


def test_the_tables_hold_the_figures(tmp_path):
    path = results(tmp_path / "one.json", "test_loss", loss_row())
    assert "| text | fp32 | 1 | 10 | 50% | 100% | 0.0 MB | 4.0 | 3.0 | 20.0 | 5.0 |" in report.loss_table(path)
    assert "| text | fp32 | 0.5 | 20 | 4.0 | 3.0 | 20.0 | 5.0 |" in report.reused_loss_table(path)
    assert report.called_loss_table(path) == ""
    row = loss_row() | {"norm": "instance"}
    row["seconds_called"] = row.pop("seconds_reused")
    path = results(tmp_path / "gpu.json", "test_loss", row)
    assert "| text | fp32 | 1 | 10 | 50% | – | 0.0 MB | 4.0 | 3.0 | 20.0 | 5.0 |" in report.loss_table(path)
    assert "| text | fp32 | 0.5 | 20 | 4.0 | 3.0 | 20.0 | 5.0 |" in report.called_loss_table(path)
    assert report.machine(path) == "a processor, 2 threads; torch 2.13.0; commit 0123456"
    report.plot(path, tmp_path / "plot.svg")
    assert "eager" in (tmp_path / "plot.svg").read_text()

    path = results(tmp_path / "step.json", "test_step", step_row())
    assert "| speech | an hour's work | 1500 | 5.3 | 67 | 33% | 1.0 GB | 1.5 |" in report.step_table(path)
    assert "| speech | fused | 0.0 | 100.0 | 200.0 | 300.0 | 400.0 | 500.0 | 600.0 | 700.0 |" in report.breakdown_table(path)
    pairs = {"loss": {"all": 2.0, "without": 2.5}, "memory": {"all": 1.0, "without": 0.98}}
    path = results(tmp_path / "parts.json", "test_parts", dict(case="speech", parts=pairs))
    assert "| step without | loss | memory |" in report.parts_table(path)
    assert "| speech | +25% | -2% |" in report.parts_table(path)
    row = dict(case="text", seconds={"in pieces": 2.0, "whole": 2.05}, overhead=0.025)
    assert "| text | 2000 | 2050 | +2.5% |" in report.splicing_table(results(tmp_path / "splicing.json", "test_splicing", row))
    seconds = {"fused": 0.01, "state dict loop": 0.05, "in-place loop": 0.02, "foreach mul + add": 0.015}
    row = dict(case="base", seconds=seconds, bytes=10**8, copy_bandwidth=2e10)
    assert "| base | 10.0 | 10.0 | 50% | 5.0 | 2.0 | 1.5 |" in report.ema_table(results(tmp_path / "ema.json", "test_ema", row))
    row = dict(case="audio/tiny", log_every=20, seconds_a_line=0.01, seconds_a_step=0.1)
    assert "| audio/tiny | 100 | 10.0 | 20 | 0.50% |" in report.monitor_table(results(tmp_path / "m.json", "test_monitor", row))
    found = [dict(case="text", figure=x, unit="cpu-s", aim="< 1", blocks=1) for x in (0.0766, 3127.4)]
    table = report.corpora_table(results(tmp_path / "corpora.json", "corpora", *found))
    assert "| text | 0.0766 | cpu-s | < 1 |" in table and "| text | 3,127 | cpu-s | < 1 |" in table
    path = results(tmp_path / "sweep.json", "test_sweep", *(dict(axis=axis, seconds={"1": 0.1, "2": 0.2}) for axis in "ab"))
    report.plot(path, tmp_path / "sweep.svg")
    assert "as one size grows" in (tmp_path / "sweep.svg").read_text()


def kernel_row(**figures):
    about = dict(case="text", kernel="_loss_rows_kernel", dtype="bfloat16", stats=False, turned=False, arch=80)
    figures = dict(warps=4, registers=64, shared=12288, spills=0, instructions=900, loop=219) | figures
    return about | figures


def test_a_kernel_has_one_line_for_all_gpus(tmp_path):
    found = [kernel_row(), kernel_row(arch=90, loop=0), kernel_row(arch=100, registers=72), kernel_row(kernel="_scale_kernel")]
    path = results(tmp_path / "kernels.json", "kernels", *found, gpu="three GPUs, not run")
    table = report.kernels_table(path)
    assert "| text | loss_rows | 4 | 64 / 64 / 72 | 12288 | 0 | 219 / – / 219 |" in table and "scale" not in table
    assert "| text | scale | 4 / – / – |" in report.kernels_table(path, everything=True)
    assert report.machine(path) == "three GPUs, not run; torch 2.13.0; commit 0123456"


def test_changes_of_kernels_are_named():
    old = [kernel_row(), kernel_row(arch=90), kernel_row(case="gone")]
    new = [kernel_row(loop=180, spills=8), kernel_row(arch=90), kernel_row(case="new")]
    assert kernels.changes(new, old) == ["text, _loss_rows_kernel, sm_80: spills 0 → 8, loop 219 → 180"]


def test_the_committed_kernels_are_those_of_the_recipes():
    found = report.rows(report.RESULTS / "kernels.json", "kernels")
    assert {row["arch"] for row in found} == set(kernels.ARCHITECTURES)
    assert {row["case"] for row in found} == {*kernels.LOSSES, *kernels.CONVOLUTIONS}
    assert {row["kernel"] for row in found} == {*kernels.LOSS_KERNELS, *kernels.CONV_KERNELS}
    assert {row["case"] for row in report.rows(report.RESULTS / "kernels.json", "calls")} == set(kernels.LOSSES)


def call_row(**figures):
    return dict(case="text", dtype="bfloat16", stats=False, batch=8, forward=3, backward=1, bytes=8 * 10**6) | figures


def test_calls_before_and_after(tmp_path):
    def file(name, calls, found):
        path = results(tmp_path / name, "kernels", *found)
        content = json.loads(path.read_text())
        content["benchmarks"] += [dict(name="calls", extra_info=row) for row in calls]
        path.write_text(json.dumps(content))
        return path

    calls = [call_row(), call_row(stats=True), call_row(case="text, 8 views"), call_row(case="audio, 8 views")]
    found = [kernel_row(arch=90), kernel_row(kernel="_order_kernel", arch=90), kernel_row(registers=999)]
    now = file("kernels.json", calls, [*found, kernel_row(case="text, 8 views", arch=90)])
    assert report.calls_table(now) == ""
    calls = [call_row(forward=4, backward=4, bytes=12 * 10**6), call_row(case="audio, 8 views")]
    before = file("kernels-before.json", calls, [kernel_row(arch=90, registers=72, loop=0)])
    _, _, *lines = report.calls_table(now).splitlines()
    assert lines == ["| text | 4 → 3 | 4 → 1 | 12.0 → 8.0 | 4 | 72 → 64 | 12288 | 0 | – → 219 |"]
    assert report.calls_table(now, before) == report.calls_table(now)


def test_launches_and_bytes_of_a_call(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.undo()  # otherwise the writes of NaN to empty tensors are counted
    shape = kernels.LossShape(channels=64, length=8, k=2)
    found = kernels.call(shape, False, batch=3)  # 12 of 24 positions are scored, 128 bytes each
    rows, partial = 12 * 128, 8  # predictions, their gradient, rows of a layer; loss and count of one program
    order = 24 + 4 * 12
    expected = order + (4 * rows + 4 * 12 + partial) + (partial + 3 * 4) + (2 * rows + 2 * 4)
    assert found == dict(batch=3, forward=3, backward=1, bytes=expected)


def test_operations_of_torch_are_reported():
    found = []
    with kernels.Operations(lambda operation, tensors: found.append((str(operation), [x.nbytes for x in tensors]))):
        x = torch.ones(2, 3)
        x.new_empty(5), x.view(6), torch.zeros(0)
        x.view(6).add(1, alpha=2)
    assert found == [("aten.ones.default", [24]), ("aten.add.Tensor", [24, 24])]


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/              @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""


def test_instructions_of_the_first_inner_loop_that_loads():
    assert kernels.instructions(SASS) == (8, 3)
    assert kernels.instructions(SASS.replace("LDG.E.128", "LDS.128")) == (8, 0)


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_the_tables_of_a_page_are_those_of_the_results(page):
    text = (Path(__file__).parents[1] / page).read_text()
    assert "<!-- end -->" in text and report.updated(text) == text


def test_a_table_without_results_says_so():
    page = "a\n<!-- gpu-none.json loss -->\n| old |\n<!-- end -->\nb"
    assert report.updated(page) == "a\n<!-- gpu-none.json loss -->\nNot yet measured.\n<!-- end -->\nb"


def test_a_dry_run_gives_no_table(tmp_path, monkeypatch):
    path = results(tmp_path / "dry.json", "test_loss", loss_row(), dry_run=True)
    for read in (report.loss_table, report.machine, report.slow_rates, lambda path: report.regressions(path, path)):
        with pytest.raises(SystemExit, match=r"dry\.json: written by a dry run"):
            read(path)
    monkeypatch.setattr(sys, "argv", ["report", str(path), "--plot", str(tmp_path / "dry.svg")])
    with pytest.raises(SystemExit, match="written by a dry run"):
        report.main()
    assert not (tmp_path / "dry.svg").exists()


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_each_input_is_captured_in_one_graph(turns, monkeypatch):
    """A stand-in records which inputs are used while a graph is captured, and uses them again when it is replayed."""
    used, capturing = [], []

    class Graph:
        def replay(self):
            used.append(self.inputs)

    @contextmanager
    def capture(graph):
        del used[:]
        yield
        (graph.inputs,) = used
        capturing.append(graph.inputs)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    inputs = itertools.cycle(range(turns))
    replay = replayed(lambda: used.append(next(inputs)), turns)
    assert sorted(capturing) == list(range(turns))
    del used[:]
    for _ in range(2 * turns):
        replay()
    assert used == 2 * capturing


def test_a_slow_run_is_marked_and_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rates = dict(load=0.1, copy=30e9, fp32=200e9, bf16=400e9)
    old = results(tmp_path / "old.json", "test_loss", loss_row(), rates=[rates, rates])
    slow = results(tmp_path / "slow.json", "test_loss", loss_row(), rates=[rates, rates | dict(copy=15e9)])
    assert report.slow_rates(old) == [] and report.slow_rates(slow) == ["copy 50% of the best seen here"]
    other = dict(cpu=dict(brand_raw="a processor", l2_cache_size=1), rates=[rates | dict(bf16=1e9)] * 2)
    assert report.slow_rates(results(tmp_path / "other.json", "test_loss", loss_row(), **other)) == []
    assert "copy 30 GB/s, products 200 (fp32) and 400 (bf16) GFLOP/s, load before 0.1" in report.machine(old)
    assert "**slow run**: copy 50%" in report.machine(slow)
    monkeypatch.setattr(sys, "argv", ["report", str(slow), "--against", str(old)])
    with pytest.raises(SystemExit, match="not compared, the machine was slow: copy 50% of the best seen here"):
        report.main()


@pytest.mark.parametrize("case", [LOSS_CASES[0], LOSS_CASES[6], *LOSS_CASES_2], ids=lambda case: case.name)
@pytest.mark.parametrize("baseline", [gather_first, published])
def test_the_baselines_compute_the_same_loss(case, baseline):
    case = replace(case, batch=2, length=50, top_k=3, channels=32)
    predictions, layers, mask = case.tensors(torch.float32, "cpu", seed=0)
    index = mask.flatten().nonzero().squeeze(1)
    assert len(predictions) == len(index)
    torch.testing.assert_close(baseline(predictions, layers, index, case), fused(predictions, layers, mask, case, "eager"))


def test_corpora_are_as_large_as_asked_for_and_costs_are_those_of_the_call(tmp_path):
    lines = (corpora.write_text(tmp_path / "text", 50_000, 600) / "000.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["text"]) for line in lines] == [600] * (50_000 // 600)
    manifest = corpora.write_manifest(tmp_path / "train.tsv", 20)
    (cost,) = corpora.alone(corpora.open_manifest, manifest, warm=(manifest,))
    assert cost.result == (20, 0) and cost.peak > corpora.MB
    (tmp_path / "recordings").mkdir()
    manifest.write_text(manifest.read_text().replace("\t", "\tunknown"))  # so that recordings are opened for their lengths
    (cold,) = corpora.alone(corpora.open_manifest, manifest)
    assert cold.result[1] >= 20
    assert cold.seconds > cost.seconds > 0  # imports count unless an earlier call made them


@pytest.mark.parametrize("size", [corpora.PHOTO, (1500, 1200)])
def test_images_by_pillow_alone_are_those_of_training(tmp_path, size):
    folder = corpora.write_images(tmp_path / "images", size, 4)
    data = ImageData(mask=RandomMask(), path=str(folder))
    data.grid = (14, 14)
    found = data.unfinished([(0, index) for index in range(4)])["source"].numpy()
    for index, file in enumerate(sorted(folder.iterdir())):
        assert (found[index] == np.asarray(corpora.by_pillow(file, index, augment=True)).transpose(2, 0, 1)).all()
