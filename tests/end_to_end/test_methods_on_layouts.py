"""Every method and codec on every parallel layout, at two sites of real processes."""

import json

import pytest

from tests.end_to_end.forked import lighthouse, start_ranks
from tests.end_to_end.method_runs import ANY_LAYOUT_ONE_RESULT, CASES, STEPS, inner_of, run_cases
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from titan_ext.config import load_site
from titan_ext.config.cost.cost import site_cost

OWN_STATES = ("diloco streaming", "mt_dao", "lordo", "sparta", "demo", "topk codec", "eager int4", "des_loc adopt")
"""Cases with states besides an outer momentum, or in flight: they are also stopped in the middle and resumed, to the same bits."""

_plain: dict[str, dict] = {}


@pytest.mark.parametrize(
    ("layout", "resumed"),
    [
        *(pytest.param(layout, OWN_STATES, id=layout) for layout in ("plain", "fsdp2", "pp2")),
        *(
            pytest.param(layout, tuple(CASES), marks=pytest.mark.slow, id=f"{layout}, all resumed")
            for layout in ("plain", "fsdp2", "pp2", "tp2", "fsdp2_tp2")
        ),
    ],
)
def test_every_method_and_codec(layout, resumed, tmp_path, text_corpus):
    ranks, parallelism = LAYOUTS[layout]
    config = write_config(tmp_path, ["a", "b"], [f'"{text_corpus}"'] * 2, parallelism)
    with lighthouse(2) as url:
        arguments = [(config, name, tmp_path, resumed) for name in ("a", "b")]
        sites = [start_ranks(config, each[1], ranks, url, run_cases, *each) for each in arguments]
        for site in sites:
            assert site.wait() == [0] * ranks, site.log()[-3000:]
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b"))
    for name in CASES:
        assert first[name]["sha256"] == second[name]["sha256"], name
        assert first[name].get("resumed", first[name]["sha256"]) == first[name]["sha256"], f"{name} resumed otherwise"
        assert ("resumed" in first[name]) == (name in resumed)
    assert first["all of topk"]["sha256"] == first["diloco"]["sha256"]
    for codec, levels in (("int8", 127), ("int4", 7), ("bf16", 256)):
        _assert_near(first[f"{codec} codec"], first["diloco"], levels)
    assert first["int8 codec"]["bytes"] <= 0.28 * first["diloco"]["bytes"]
    assert first["int4 codec"]["bytes"] <= 0.15 * first["diloco"]["bytes"]
    for name, settings in CASES.items():
        # What a rank holds, and so its messages and their padding, is predicted from even cuts, and so is how many
        # values of each block are not zero.
        exact = layout == "plain" and name != "sparsyfed"
        assert first[name]["bytes"] == pytest.approx(_predicted(config, name, settings), rel=0 if exact else 0.1), name
    if layout == "plain":
        _plain.update(first)
    elif _plain:
        for name in ANY_LAYOUT_ONE_RESULT:
            assert first[name]["sha256"] == _plain[name]["sha256"], f"{name} depends on the layout"


def _assert_near(coded, exact, levels: int) -> None:
    """A coded pseudo-gradient is off by at most a step of its block at each of two codings, here of three rounds;
    the outer step (lr 0.7, Nesterov 0.9) moves a parameter by at most 0.7 * 1.9 * 2.71 of that, and so does each
    inner trajectory that starts from there."""
    largest_pseudo_gradient = 0.05  # AdamW at 1e-2 for two steps, and its coding error of the round before
    bound = 3 * 2 * largest_pseudo_gradient / (2 * levels) * 0.7 * 1.9 * 2.71 * 1.5
    for mine, theirs in zip(coded["sample"], exact["sample"]):
        assert max(abs(a - b) for a, b in zip(mine, theirs)) <= bound


def _predicted(config, name: str, settings: dict) -> int:
    """What ``titan-ext check`` says that the site will send."""
    settings = {"method": name, **settings}
    inner, kwargs = inner_of(settings)
    settings = {"sync_every": 1} | settings if settings["method"] == "demo" else settings
    flags = [f"--semi_sync.{key}={value}" for key, value in settings.items() if key != "settings"]
    for owner, own in settings.get("settings", {}).items():
        flags += [f"--semi_sync.{owner}.{key}={value}" for key, value in own.items()]
    flags += [f"--optimizer.name={inner}", *(f"--optimizer.{key}={value}" for key, value in kwargs.items())]
    return site_cost(load_site(config, "a", [*flags, f"--training.steps={STEPS}"])).run_bytes
