"""``titan-ext selftest`` on the CPU: a table in which everything is right, and one that tells what is wrong."""

import pytest
import torch

from titan_ext import cli
from titan_ext.selftest import tensors
from titan_ext.selftest.row import compared
from titan_ext.semi_sync.wire.codecs import CODECS

PARTS = "codecs,optimizers,outer-loop,off-load,ratios"


def test_all_that_one_process_can_is_right_on_the_cpu(capsys):
    assert cli.main(["selftest", "--device", "cpu", "--parts", PARTS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(not line.startswith("FAILED") for line in lines)
    for part in PARTS.split(","):
        assert any(line.split()[:2] in (["ok", part], ["measured", part]) for line in lines), part
    assert sum(line.startswith("ok        codecs") for line in lines) == 2 * len(list(CODECS))
    assert lines[0].startswith("titan_ext ") and lines[-1].startswith("0 failed")


@pytest.mark.slow
def test_two_sites_and_a_compiled_layer(capsys):
    assert cli.main(["selftest", "--device", "cpu", "--parts", "training,compile"]) == 0
    assert "two sites, hashes" in capsys.readouterr().out


def test_what_is_wrong_is_told_and_the_rest_goes_on(capsys, monkeypatch):
    right = tensors._stepped

    def wrong(name, settings, device, calls=[]):
        calls.append(name)
        found = right(name, settings, device)
        return found + 1 if name == "ADOPT" and calls.count("ADOPT") == 2 else found

    def broken(device):
        raise RuntimeError("no kernel image\nis available")
        yield

    monkeypatch.setattr(tensors, "_stepped", wrong)
    monkeypatch.setattr(tensors, "off_load", broken)
    assert cli.main(["selftest", "--device", "cpu", "--parts", "off-load,optimizers"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (adopt,) = (line for line in lines if "ADOPT" in line and "QH" not in line)
    assert adopt.startswith("FAILED") and "off by" in adopt
    assert any(line.startswith("FAILED") and "RuntimeError: no kernel image" in line for line in lines)
    assert any(line.startswith("ok") and "QHSGDM" in line for line in lines) and lines[-1].startswith("2 failed")


@pytest.mark.parametrize("flags", [["--device", "tpu"], ["--parts", "codecs,colour"]])
def test_a_wrong_option_is_one_line(flags, capsys):
    assert cli.main(["selftest", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("titan-ext: error: --") and "\n" not in said


@pytest.mark.parametrize(
    "found, tolerance, verdict",
    [
        ([1.0, 2.0], 0.0, "ok"),
        ([1.0, 2.1], 0.1, "ok"),
        ([1.0, 2.3], 0.1, "FAILED"),
        ([1.0, float("nan")], 1.0, "FAILED"),
    ],
)
def test_a_difference_counts_in_units_of_the_largest_value(found, tolerance, verdict):
    row = compared("x", "y", torch.tensor(found), torch.tensor([1.0, 2.0]), tolerance)
    assert row.verdict == verdict
