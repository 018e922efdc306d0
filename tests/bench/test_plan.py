"""``titan-ext bench plan`` on a corner of its grid."""

import argparse

import pytest

from titan_ext.bench import plan
from titan_ext.errors import UserError


def options(**given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given})


def test_the_planner_is_near_the_laboratory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(plan, "_PERIODS", (8, 32))
    monkeypatch.setattr(plan, "_MBIT", (50, 5000))
    monkeypatch.setattr(plan, "_PUBLISHED", {50: (0.55, 2.41), 5000: (40.2, 68.1)})
    found = plan.run(options(rtt_ms=20.0, variants="diloco,int8,streaming"))
    assert found["within"] and found["largest_ratio"] <= 1.2 and found["covered"] >= 0.9
    assert found["cells"] == sum(found[variant]["cells"] for variant in ("diloco", "int8", "streaming")) == 10
    assert [each["likely"] for each in found["rows"]] == pytest.approx(
        [each["rehearsed"] for each in found["rows"]], rel=0.2
    )
    printed = capsys.readouterr().out
    assert "H = 32" in printed and "measured" in printed


def test_variants_that_are_not_there() -> None:
    with pytest.raises(UserError, match="--variants sparse: must be one of diloco, int8"):
        plan.run(options(variants="diloco,sparse"))
