"""The bit check sees a difference of one bit, and compares nothing that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts import same_bits


def test_a_hash_changes_with_one_bit_a_name_and_a_shape_and_not_with_the_file_around_it(tmp_path: Path) -> None:
    weight = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    flipped = weight.copy()
    flipped.view(np.uint32)[2, 3] ^= 1
    variants = {"a": weight, "b": flipped}, {"a": weight}, {"b": weight}, {"a": flipped}, {"a": weight.reshape(4, 3)}
    hashes = []
    for number, tensors in enumerate(variants):
        save_file(tensors, tmp_path / str(number))
        hashes.append(same_bits.hash_of(tmp_path / str(number)))
    assert len(set(hashes)) == len(hashes)
    save_file({"a": weight}, tmp_path / "again", metadata={"written": "later"})
    assert same_bits.hash_of(tmp_path / "again") == hashes[1]


def test_a_run_that_differs_is_named_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: f"hash of {name}" for name in same_bits.RUNS}
    monkeypatch.setattr(same_bits, "weights_after", lambda tree, settings: f"hash of {names[tuple(settings)]}")
    names = {tuple(settings): name for name, settings in same_bits.RUNS.items()}
    record = {"commit": "0123456789", "machine": same_bits.machine(), "weights": weights}
    file = tmp_path / "record.json"
    file.write_text(json.dumps(record))
    assert same_bits.main([str(file)]) == 0
    first = next(iter(weights))
    file.write_text(json.dumps({**record, "weights": {**weights, first: "another"}}))
    capsys.readouterr()
    assert same_bits.main([str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(first) for line in lines] == ["DIFFERENT" in line for line in lines]


@pytest.mark.parametrize(("reference", "said"), [("record", "is of another machine"), ("nowhere", "nor a commit")])
def test_what_cannot_be_compared_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: str, said: str
) -> None:
    record = {"commit": "0123456789", "machine": {"cpu": "an abacus"}, "weights": {}}
    (tmp_path / "record").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as ended:
        same_bits.main([str(tmp_path / reference) if reference == "record" else reference])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
