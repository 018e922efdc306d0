"""``titan-ext dept eval`` on the checkpoints of real runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from titan_ext.cli import main
from titan_ext.dept.measures import Figures, labels_of, total

TOKENS = "--tokens=1280"


def evaluate(config: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """The last line of the command."""
    assert main(["dept", "eval", str(config), *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_sites_of_different_vocabularies_are_compared_by_the_normalised_loss(spec_opt, capsys):
    report = evaluate(spec_opt, capsys, TOKENS)
    assert [row["site"] for row in report["sites"]] == ["a", "b"] and report["plasticity"] is None
    for row in (*report["sites"], report["total"]):
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["normalised_loss"] == pytest.approx(row["loss"] - row["unigram_ce"])
        assert row["unknown_rate"] == 0
    # Bytes are easier to guess than what they are merged into.
    assert report["sites"][0]["unigram_ce"] < report["sites"][1]["unigram_ce"]
    mean = sum(row["loss"] * row["tokens"] for row in report["sites"]) / report["total"]["tokens"]
    assert report["total"]["loss"] == pytest.approx(mean)
    (alone,) = evaluate(spec_opt, capsys, TOKENS, "--site=b")["sites"]
    assert alone == report["sites"][1]


def test_tokens_that_a_trimmed_site_does_not_hold_are_counted(trim, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("中文" * 500)
    report = evaluate(trim, capsys, TOKENS, "--site=a", f"--corpus={other}")
    assert 0.5 < report["sites"][0]["unknown_rate"] <= 1
    assert evaluate(trim, capsys, TOKENS, "--site=a")["sites"][0]["unknown_rate"] < 0.1


def test_a_body_takes_to_another_vocabulary(trim, text_corpus, capsys):
    flags = ["--tokens=0", f"--plasticity={text_corpus}", "--tokenizer=byte", "--steps=20", "--lr=1e-2"]
    curves = [evaluate(trim, capsys, *flags, "--plasticity-tokens=640", f"--seed={seed}") for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2] and curves[0]["sites"] == []
    curve = curves[0]["plasticity"]
    assert [point["step"] for point in curve["points"]] == list(range(0, 21, 2))
    losses = [point["loss"] for point in curve["points"]]
    assert losses[0] > math.log(259) - 0.5 and losses[-1] < losses[0] - 1
    last = curve["points"][-1]
    assert last["normalised_loss"] == pytest.approx(last["loss"] - curve["unigram_ce"])


def test_the_total_weighs_tokens():
    figures = total([Figures("a", 1, 2.0, 1.0, 0.0), Figures("b", 3, 4.0, 5.0, 0.4)])
    assert (figures.tokens, figures.loss, figures.unigram, figures.normalised) == (4, 3.5, 4.0, -0.5)
    assert figures.unknown == pytest.approx(0.3) and figures.perplexity == math.exp(3.5)
    assert labels_of([({}, torch.ones(2, 3)), ({}, torch.ones(1, 3))]).shape == (9,)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tokens=0"], "--tokens 0: must be at least 1, or 0 with --plasticity"),
        (["--plasticity=builtin:docs"], "--plasticity builtin:docs: needs --tokenizer"),
        (["--tokenizer=byte"], "--tokenizer byte: needs --plasticity"),
        (["--plasticity=builtin:docs", "--tokenizer=byte", "--steps=0"], "--steps 0: must be at least 1"),
        (["--plasticity=builtin:docs", "--tokenizer=byte", "--lr=0"], "--lr 0: must be a number above 0"),
        (["--site=c"], 'no site "c"'),
        (["--step=9"], 'site "a": no finished checkpoint in'),
    ],
)
def test_bad_input_is_one_line(spec_opt, capsys, arguments, words):
    assert main(["dept", "eval", str(spec_opt), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
