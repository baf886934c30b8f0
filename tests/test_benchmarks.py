import json

import pytest
import torch

from benchmarks import report
from benchmarks.cases import LOSS_CASES
from benchmarks.test_bench_loss import gather_first
from d2v_fast import data2vec_loss


def results(path, factor=1.0):
    seconds = {"fused": 1e-3, "eager": 2e-2 * factor, "compile": 5e-3, "gather first": 4e-3, "gather first, compile": 3e-3}
    row = dict(
        case="text",
        dtype="float32",
        bytes=10**7,
        gradient_bytes=10**6,
        copy_bandwidth=2e10,
        row_bandwidth=1e10,
        seconds=seconds,
        extra_bytes=dict.fromkeys(seconds, 10**6),
    )
    machine = dict(cpu=dict(brand_raw="a processor"), threads=2, torch="2.13.0")
    path.write_text(
        json.dumps(dict(benchmarks=[dict(extra_info=row)], machine_info=machine, commit_info=dict(id="0123456789")))
    )
    return path


def test_the_gate_fails_on_a_ratio_that_fell_by_more_than_15_percent(tmp_path):
    old = results(tmp_path / "old.json")
    assert report.regressions(results(tmp_path / "same.json", 0.86), old) == []
    found = report.regressions(results(tmp_path / "slow.json", 0.84), old)
    assert len(found) == 1 and "text float32: 16.80 × eager, committed 20.00" in found[0]


def test_the_table_holds_the_figures(tmp_path):
    path = results(tmp_path / "one.json")
    assert "| text | fp32 | 1.00 | 10.0 | 50% | 100% | 0.0 MB | 20.0 | 5.0 | 4.0 | 3.0 |" in report.table(path)
    assert report.machine(path) == "a processor, 2 threads; torch 2.13.0; commit 0123456"
    report.plot(results(tmp_path / "two.json"), tmp_path / "plot.svg")
    assert "eager" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize("norm", ["layer", "instance"])
def test_the_baseline_computes_the_same_loss(norm):
    case = next(case for case in LOSS_CASES if case.norm == norm)
    predictions, layers, mask = case.tensors(torch.float32, "cpu", seed=0)
    index = mask.flatten().nonzero().squeeze(1)
    expected = data2vec_loss(predictions, layers, mask, norm=norm, impl="eager")
    torch.testing.assert_close(gather_first(predictions, layers, index, norm), expected)
