"""What the tuner tries, and what it says where it cannot."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from kernels.flash_attention.config import choose_tiles
from scripts import tune_attention
from scripts.tune_attention import KERNELS, candidates


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (0, 0)])
def test_the_tiles_of_now_are_the_first_of_many_and_tried_once(capability):
    for kernel, head_dim in product(KERNELS, (64, 128, 256)):
        now = choose_tiles(kernel, head_dim, capability)
        tried = candidates(kernel, head_dim, now)
        assert tried[0] == now
        assert len(set(tried)) == len(tried) > 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        tune_attention.main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: scripts.tune_attention needs a CUDA GPU, and this machine has none\n"
