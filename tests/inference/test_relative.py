"""``titan-ext eval --relative``: who gains by taking part."""

import json
import math
import shutil

import pytest

from titan_ext.cli import main
from titan_ext.inference.relative import Gap, summarize

TOKENS = "--tokens=1280"


def test_the_figures():
    gaps = [Gap("a", 10, 2.0, 2.5), Gap("b", 10, 3.0, 2.8), Gap("c", 10, 1.0, 1.0)]
    found = summarize(gaps)
    assert [site["gap"] for site in found["sites"]] == pytest.approx([0.5, -0.2, 0.0])
    assert (found["underperformers"], found["worst_site"]) == (1, "b")
    assert found["worst_gap"] == pytest.approx(-0.2) and found["mean_gap"] == pytest.approx(0.1)
    mean = 0.1
    assert found["spread"] == pytest.approx(math.sqrt(sum((g - mean) ** 2 for g in (0.5, -0.2, 0.0)) / 3))
    assert found["loss_spread"] == pytest.approx(math.sqrt(2 / 3))


@pytest.fixture
def runs(config_file, tmp_path):
    """The run's folder with checkpoints up to step 3, and one of the same site 'alone'."""
    for name in ("federated", "alone"):
        for step in ("step-2", "step-3"):
            shutil.copytree(config_file.parent / "a" / "checkpoint" / step, tmp_path / name / "a" / "checkpoint" / step)
    return tmp_path


def test_two_models_of_a_site(config_file, runs, evaluate, capsys):
    at = {step: str(config_file.parent / "a" / "checkpoint" / step) for step in ("step-2", "step-3")}
    (expected,) = evaluate(TOKENS, f"--checkpoint={at['step-3']}", "--weights=global")["perplexity"]
    (own,) = evaluate(TOKENS, f"--checkpoint={at['step-3']}")["perplexity"]
    command = [
        "eval",
        str(config_file),
        f"--dump_folder={runs / 'federated'}",
        TOKENS,
        "--relative",
        str(runs / "alone"),
    ]
    for name, tokens in (("federated", 3000), ("alone", 1500)):
        lines = [
            {"kind": "note"},
            {"kind": "step", "step": 3, "tokens": 1},
            {"kind": "step", "step": 3, "tokens": tokens},
        ]
        (runs / name / "a" / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main([*command, "--weights=global"]) == 0
    out = capsys.readouterr().out
    assert "note: a: not of equal tokens: 3,000 with the others, 1,500 alone" in out
    report = json.loads(out.splitlines()[-1])
    (site,) = report["sites"]
    assert (site["site"], site["step"]) == ("a", 3)
    assert site["federated"] == pytest.approx(expected["loss"]) and site["alone"] == pytest.approx(own["loss"])
    assert report["worst_gap"] == pytest.approx(own["loss"] - expected["loss"])

    record = runs / "alone" / "a" / "config.json"
    record.write_text('{"semi_sync": {"method": "diloco"}}')
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'site "a" trained there with the others too (semi_sync.method = "diloco")' in line
    record.unlink()
    shutil.rmtree(runs / "alone" / "a" / "checkpoint" / "step-3")
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "alone to step 2, with the others to step 3" in line
    shutil.rmtree(runs / "alone" / "a")
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no a/checkpoint; train the site alone with --semi_sync.method none" in line


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--relative", "nowhere"], "--relative nowhere: no such folder"),
        (["--relative", ".", "--tasks", "x"], "--tasks x: left out"),
        (["--relative", ".", "--checkpoint", "x"], "--checkpoint x: left out"),
        (["--relative", ".", "--iterations", "2"], "--iterations 2: left out"),
    ],
)
def test_bad_flags(flags, problem, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.touch()
    assert main(["eval", str(file), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
