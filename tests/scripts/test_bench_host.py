"""scripts.bench_host measures calls of which nothing but the launches is left out."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from kernels.flash_attention import hopper
from scripts import bench_host


def test_figures_of_both_directions_for_one_shape_for_new_ones_and_for_autograd_alone(capsys, monkeypatch):
    lengths = []
    forward = hopper.forward
    monkeypatch.setattr(hopper, "forward", lambda q, *args, **kw: lengths.append(q.shape[1]) or forward(q, *args, **kw))
    bench_host.main(["--no-launch", "--calls", "2", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert len(re.findall(r"forward +[\d.]+ µs   backward +[\d.]+ µs", printed)) == 3
    ones, new = lengths[:7], lengths[7:]
    assert set(ones) == {64}
    assert len(set(new)) == len(new) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_whole_calls_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        bench_host.main([])
    assert "no CUDA GPU here; pass --no-launch" in capsys.readouterr().err
