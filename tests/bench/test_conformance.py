"""``titan-ext bench conformance``: what needs no package beyond the tests' own, and what is said of the rest."""

import json

import pytest
import torch

from titan_ext import cli
from titan_ext.bench.conformance import optimizers
from titan_ext.bench.conformance.checks import Check, Part, checks_of, close
from titan_ext.optim import QHAdamW


def figures(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_torch_and_files_are_as_others_read_them(capsys):
    """Optimizers beside torch's, and a checkpoint that a process without titan_ext reads."""
    assert cli.main(["bench", "conformance", "--parts", "torch,plain_checkpoint"]) == 0
    found = figures(capsys)
    assert found["differs"] == found["skipped"] == 0
    assert {row["part"] for row in found["rows"]} == {"torch", "plain_checkpoint"} and found["holds"] >= 6


def test_an_exported_model_has_its_logits_in_transformers(capsys):
    pytest.importorskip("transformers")
    assert cli.main(["bench", "conformance", "--parts", "transformers"]) == 0
    assert figures(capsys)["holds"] == 1


def test_an_exported_model_has_its_likelihoods_in_the_harness(capsys):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    assert cli.main(["bench", "conformance", "--parts", "lm_eval"]) == 0
    assert figures(capsys)["holds"] == 2


def test_a_part_without_its_package_says_which():
    part = Part({"no_such_module": "no-such-package"}, lambda name: pytest.fail("run"))
    (check,) = checks_of("x", part)
    assert check.outcome == "skipped" and check.detail == "not installed: pip install no-such-package"

    def lacking(name):
        raise ModuleNotFoundError("No module named 'grpc'")

    (check,) = checks_of("x", Part({}, lacking))
    assert check.outcome == "skipped" and check.detail == "cannot be imported: No module named 'grpc'"


def test_what_differs_is_an_error(monkeypatch, capsys):
    off = Check(part="torch", name="a", outcome="differs", detail="apart by 1")
    monkeypatch.setattr(optimizers, "WITH_TORCH", Part({}, lambda name: [off]))
    assert cli.main(["bench", "conformance", "--parts", "torch"]) == 1
    assert "1 of 1 checks differ" in capsys.readouterr().err
    assert cli.main(["bench", "conformance", "--parts", "torch,jax"]) == 2


def test_another_decay_is_seen():
    ours, theirs = (
        optimizers.trained(lambda each, beta=beta: QHAdamW(each, lr=1e-2, betas=(beta, 0.99), omegas=(1.0,)))
        for beta in (0.9, 0.91)
    )
    assert close("p", "n", ours, theirs, 1e-6).outcome == "differs"
    assert close("p", "n", ours, ours + 1e-9, 1e-6).outcome == "holds"
    assert close("p", "n", ours, torch.full_like(ours, float("nan"))).outcome == "differs"


@pytest.mark.slow
def test_torchfts_own_suites_pass_with_the_drop_in(capsys):
    pytest.importorskip("parameterized")
    assert cli.main(["bench", "conformance", "--parts", "torchft,torchft_traces"]) == 0
    assert figures(capsys)["holds"] >= 10
