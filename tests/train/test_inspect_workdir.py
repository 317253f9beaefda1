import argparse
import json

import pytest
from toy_task import fit_toy

from hyperlora_jax.cli import compile as compile_command
from hyperlora_jax.cli import inspect_workdir
from hyperlora_jax.errors import UserError


def test_state_of_a_run(tmp_path, capsys):
    fit_toy(tmp_path / "run")
    parser = argparse.ArgumentParser()
    inspect_workdir.add_arguments(parser)
    file = tmp_path / "found.json"
    assert inspect_workdir.run(parser.parse_args([str(tmp_path / "run"), "--json", str(file)])) == 0
    text = capsys.readouterr().out
    assert "1 start(s), last event end" in text
    assert "checkpoints at steps [10, 12]" in text
    assert "wall " in text
    assert 'spec: "abc"' in text
    assert json.loads(file.read_text())["last_row"]["step"] == 12


def test_no_workdir(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoints and no metrics.jsonl"):
        inspect_workdir.summary(tmp_path)


def test_json_that_cannot_be_written(tmp_path):
    fit_toy(tmp_path / "run", num_steps=1)
    arguments = argparse.Namespace(workdir=str(tmp_path / "run"), json=str(tmp_path / "no" / "x"))
    with pytest.raises(UserError, match=r"--json .*/no/x: No such file"):
        inspect_workdir.run(arguments)


def test_compile_record_as_text():
    record = {
        "topology": "v5e-16", "chips": 16, "fits": True, "mesh": {"data": 16}, "remat": "none",
        "batch_per_chip": 8, "effort": "full", "compile_seconds": 12.0, "flops_per_chip": 2e12,
        "bytes": {"arguments": 2**30, "temporaries": 2**31, "peak": 3 * 2**30, "limit": 2**34},
        "collective_bytes": {"all-reduce": {"data": 2**20}}, "step_seconds_estimate": 0.02,
        "seconds_estimate": {"compute": 0.01, "memory": 0.005, "network": 0.01, "step": 0.02},
        "mfu_estimate": 0.5,
    }  # fmt: skip
    text = compile_command.as_text(record)
    assert "v5e-16: fits; 16 chips" in text
    assert "3.00 of 16.00" in text
    assert "all-reduce: data 1.0 MiB" in text
    refused = compile_command.as_text({"topology": "v5e-4", "fits": False, "reason": "too big"})
    assert "does NOT fit: too big" in refused


def test_records_of_other_slices_stay(tmp_path):
    file = tmp_path / "pods.json"
    first = [{"topology": name, "effort": "low", "fits": False} for name in ("v5e-4", "v5e-8")]
    compile_command.write_records(file, first)
    again = {"topology": "v5e-4", "effort": "low", "fits": True}
    full = {"topology": "v5e-8", "effort": "full", "fits": True}
    compile_command.write_records(file, [again, full])
    assert compile_command.read_records(file) == [first[1], again, full]
    for content in ("not json", '{"topology": 1}', "[1]"):
        file.write_text(content)
        with pytest.raises(UserError, match="expected records of hyperlora compile"):
            compile_command.write_records(file, first)
        assert file.read_text() == content
