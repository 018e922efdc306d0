"""``titan-ext plan`` on a small file, against arithmetic written out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.config.conftest import GOOD, write  # noqa: F401  (fixture)
from titan_ext import cli
from titan_ext.config.load import load_run
from titan_ext.errors import UserError
from titan_ext.links.link import Link, Links
from titan_ext.links.tcp import Transport
from titan_ext.planner.advice import advise, enough_streams, variants
from titan_ext.planner.build import Request, make_plan
from titan_ext.planner.faults import Faults
from titan_ext.planner.prediction import Surroundings, predict
from titan_ext.planner.range import Range
from titan_ext.planner.sync_time import Wiring
from titan_ext.planner.workload import with_settings, workload

PAYLOAD = 1448 / 1514


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> list:
    path = tmp_path_factory.mktemp("plan") / "demo.toml"
    path.write_text(GOOD)
    return load_run(path, needs=()).sites


def around(link: Link, step: float = 1.0, **wiring: object) -> Surroundings:
    links = Links.alike(["alpha", "beta"], link)
    return Surroundings(
        wiring=Wiring(links=links, step_jitter=0.0, **wiring),
        step_seconds=dict.fromkeys(("alpha", "beta"), Range.exactly(step)),
    )


def test_a_round_takes_its_bytes_at_the_links_rate(sites: list) -> None:
    work = workload(sites)
    (launch,) = work.launches
    found = predict(work, around(Link(1e6)))
    sync = launch.site_bytes / (1e6 / 8 * PAYLOAD)
    assert found.rounds[0].sync_seconds.likely == pytest.approx(sync) and found.rounds[0].times == 4
    assert found.utilisation.likely == pytest.approx(20 / (20 + 4 * sync))
    assert found.days.likely == pytest.approx((20 + 4 * sync) / 86400)
    assert found.utilisation.low < found.utilisation.likely < found.utilisation.high


def test_steps_hide_a_delayed_sync(sites: list) -> None:
    work = workload(with_settings(sites, fragment_sync_delay=4))
    sync = predict(work, around(Link(1e8))).rounds[0].sync_seconds.likely
    assert predict(work, around(Link(1e8), step=sync / 4)).rounds[0].stall_seconds.likely == pytest.approx(0)
    half = predict(work, around(Link(1e8), step=sync / 8)).rounds[0].stall_seconds.likely
    assert half == pytest.approx(sync / 2)


def test_round_trips_add_up(sites: list) -> None:
    """Two sites: half a trip each for statuses with weights and for a bucket, and beside them one for the quorum; where leaders
    exchange, one after the other and statuses and weights too; slow start besides."""
    work = workload(sites)
    for by_leader, expected in ((False, 1.0), (True, 2.5)):
        near, far = (predict(work, around(link, by_leader=by_leader)) for link in (Link(1e6), Link(1e6, 0.1)))
        trips = (far.rounds[0].sync_seconds.likely - near.rounds[0].sync_seconds.likely) / 0.1
        assert expected <= trips + 1e-9 <= expected + 1.0


def test_des_loc_sends_half_of_local_adam_and_a_170th_of_data_parallelism(sites: list) -> None:
    """Payload a step 1/K + 1/3K + 1/6K of the model against 3/K (arXiv 2505.22549, appendix G)."""
    changed = with_settings(sites, method="des_loc", sync_every=256)
    for site in changed:
        site.config.training = replace(site.config.training, steps=6 * 256)
    work = workload(changed)
    sent = sum(each.times * each.site_bytes for each in work.launches) / work.steps
    model = work.launches[0].site_bytes  # the parameters alone
    assert model / sent == pytest.approx(256 / 1.5, rel=1e-3)
    local_adam = workload(
        with_settings(
            changed, settings={"des_loc": dict.fromkeys(("first_moment_sync_every", "second_moment_sync_every"), 256)}
        )
    )
    assert sum(each.times * each.site_bytes for each in local_adam.launches) / work.steps == pytest.approx(
        2 * sent, rel=1e-3
    )


def test_faults_cost_participation_and_days(sites: list) -> None:
    work = workload(sites)
    calm = around(Link(1e9))
    stormy = Surroundings(
        wiring=calm.wiring,
        step_seconds=calm.step_seconds,
        faults=Faults(between={"alpha": 900.0}, recovery_seconds=95.0),
    )
    found, without = predict(work, stormy), predict(work, calm)
    assert found.participation == pytest.approx((1 + 900 / (900 + 95 + 5)) / 2, rel=1e-3)
    assert found.days.likely > without.days.likely and without.participation == 1


def test_advice_takes_the_least_loss_that_keeps_sites_busy(sites: list) -> None:
    works = variants(sites)
    outer = sites[0].config.semi_sync
    fast = advise(outer, works, around(Link(1e10)), 0.9)
    assert fast.best.sync_every == 1 and fast.best.codec == "fp32" and fast.best.delay == 0
    slow = advise(outer, works, around(Link(2e6), step=3.0), 0.9)
    assert slow.best.prediction.utilisation.low >= 0.9
    assert slow.best.loss_percent <= slow.runner_up.loss_percent
    hopeless = advise(outer, works, around(Link(1e3), step=0.01), 0.9)
    assert "nearest" in hopeless.reason
    assert enough_streams(around(Link(1e9, 0.08))) == 0  # by distance, as the file says
    one = Transport(streams=1)
    assert enough_streams(around(Link(1e9, 0.08), transport=one)) == 4
    assert enough_streams(around(Link(1e8, 0.08), transport=one)) == 1


def test_the_inverse_question(sites: list) -> None:
    request = Request(file="demo.toml", links=["1mbit"], steps=["1s"], target=0.95)
    needed = make_plan(sites, request).needed
    again = Request(file="demo.toml", links=[f"{needed.slowest_rate}bit"], steps=["1s"])
    assert make_plan(sites, again).prediction.utilisation.likely == pytest.approx(0.95, abs=1e-3)
    far = Request(file="demo.toml", links=["1mbit,10s"], steps=["1s"], target=0.95)
    assert make_plan(sites, far).needed.factor is None


def journal(folder: Path, name: str, sync: float) -> None:
    lines, time = [], 1000.0
    for step in range(1, 31):
        time += 0.5
        lines.append({"kind": "step", "step": step, "loss": 1.0, "time": time})
        if step % 5 == 0:
            parts = {"seconds_quorum": 0.1, "seconds_reduce": sync - 0.2, "seconds_apply": 0.1}
            common = {"rules": ["params/0"], "committed": True, "sites": 2, "bytes_sent": 12_345}
            time += sync
            lines.append({"kind": "round", "step": step, **common, **parts, "time": time})
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_calibrates_the_plan_and_is_compared_with_it(sites: list, tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        journal(tmp_path, name, sync=3.0)
    plan = make_plan(sites, Request(file="demo.toml", links=["1mbit"], run=str(tmp_path)))
    assert plan.prediction.step_seconds.likely == pytest.approx(0.5)
    assert plan.prediction.rounds[0].sync_seconds.likely == pytest.approx(3.0, rel=1e-6)
    by_name = {each.what: each for each in plan.comparisons}
    assert by_name["a sync (params/0)"].measured == pytest.approx(3.0)
    assert by_name["bytes of a round (params/0)"].measured == 12_345
    assert by_name["utilisation"].measured == pytest.approx(0.5 * 29 / (0.5 * 29 + 5 * 3.0), abs=1e-3)


def test_of_a_run_that_was_killed_and_whose_clock_was_set_back(sites: list, tmp_path: Path) -> None:
    journal(tmp_path, "alpha", sync=3.0)
    path = tmp_path / "alpha" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    later = [json.dumps((line := json.loads(each)) | {"time": line["time"] - 5000.0}) for each in lines[20:]]
    path.write_text("\n".join([*lines[:20], '{"kind": "step", "st', *later, '{"ki']))
    plan = make_plan(sites, Request(file="demo.toml", links=["1mbit"], run=str(tmp_path)))
    measured = {each.what: each.measured for each in plan.comparisons}
    assert measured["utilisation"] == pytest.approx(0.5 * 29 / (0.5 * 29 + 5 * 3.0), rel=0.03)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seconds_reduce": None}, "seconds_reduce = None: must be a number"),
        ({"bytes_sent": "1 MB"}, "bytes_sent = '1 MB'"),
        ({"seconds_quorum": float("nan")}, "seconds_quorum = nan"),
        ({"rules": None}, "rules = None: must be a list"),
    ],
)
def test_lines_of_a_run_that_are_refused(change: dict, told: str, sites: list, tmp_path: Path) -> None:
    journal(tmp_path, "alpha", sync=3.0)
    path = tmp_path / "alpha" / "metrics.jsonl"
    lines = [json.loads(each) for each in path.read_text().splitlines()]
    lines[5] |= change
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    with pytest.raises(UserError, match="metrics.jsonl, line 6") as refused:
        make_plan(sites, Request(file="demo.toml", links=["1mbit"], run=str(tmp_path)))
    assert told in str(refused.value)


def test_what_the_wire_does_not_explain_is_work_at_the_sites(sites: list, tmp_path: Path) -> None:
    """It does not shrink with the bytes; a link that is slower than was said makes every byte slower."""
    for name in ("alpha", "beta"):
        journal(tmp_path, name, sync=3.0)
    found = {}
    for rate in ("100gbit", "30mbit"):
        request = Request(file="demo.toml", links=[rate], run=str(tmp_path))
        plan = make_plan(sites, request)
        assert plan.prediction.rounds[0].sync_seconds.likely == pytest.approx(3.0, rel=1e-6)
        small = predict(plan.works["diloco", "int8"], plan.around)
        found[rate] = small.rounds[0].sync_seconds.likely
    assert found["100gbit"] == pytest.approx(3.0, rel=0.01)
    assert 0.7 < found["30mbit"] < 1.1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"links": []}, "--link"),
        ({"links": ["1gbit,80"]}, "'80'"),
        ({"links": ["alpha-gamma=1gbit"]}, "alpha, beta"),
        ({"steps": ["gamma=1s"]}, "alpha, beta"),
        ({"steps": ["0s"]}, "above 0"),
        ({"steps": ["1s", "2s"]}, "--step 2s: --step 1s is of all sites already"),
        ({"steps": ["1s", "beta=2s", "beta=3s"]}, "--step beta=2s is of beta already"),
        ({"flops": "400"}, "400tflops"),
        ({"mtbf": ["often"]}, "'often'"),
        ({"mtbf": ["alpha=1h", "alpha=2h"]}, "--mtbf alpha=1h is of alpha already"),
        ({"tokens": 0}, "at least 1"),
        ({"target": 95.0}, "between 0 and 1"),
        ({"prices": "nowhere.toml"}, "nowhere.toml"),
        ({"run": "nowhere"}, "metrics.jsonl"),
    ],
)
def test_flags_that_are_refused(flags: dict, told: str, sites: list) -> None:
    with pytest.raises(UserError) as refused:
        make_plan(sites, Request(**{"file": "demo.toml", "links": ["1gbit"]} | flags))
    assert told in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("currency = 3", "currency"),
        ("[default]\ngpu_hours = 1", "did you mean 'gpu_hour'"),
        ("[default]\ngpu_hour = -1", "default.gpu_hour = -1: must be a number, at least 0"),
        ("[sites.beta]\ngpu_hour = '2'", "sites.beta.gpu_hour = '2'"),
        ("sites.beta = 2", "sites.beta = 2: must be a table"),
        ('currency = "EUR"', "holds no price"),
        ("[default]\ngpu_hour = true", "at least 0"),
        ("[sites.gamma]\ngpu_hour = 1", "alpha, beta"),
        ("default = 1", "must be a table"),
        ("[site.alpha]", "sites"),
        ("currency =", "not TOML"),
    ],
)
def test_prices_that_are_refused(text: str, told: str, sites: list, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(text)
    with pytest.raises(UserError, match="prices.toml") as refused:
        make_plan(sites, Request(file="demo.toml", links=["1gbit"], prices=str(tmp_path / "prices.toml")))
    assert told in str(refused.value)


def test_text_and_json_tell_the_same(write: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    file = write()
    assert cli.main(["plan", file]) == 2 and "--link: none given" in capsys.readouterr().err
    Path("prices.toml").write_text('currency = "EUR"\n[default]\ngpu_hour = 3600\n[sites.beta]\nsite_hour = 3600\n')
    flags = ["--link", "1mbit", "--step", "1s", "--price", "prices.toml", "--target-utilisation", "0.9"]
    assert cli.main(["plan", file, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = found["prediction"]["days"]["likely"] * 86400
    assert found["prediction"]["money"]["likely"] == pytest.approx(3 * seconds)
    assert found["bytes_per_step"]["diloco/fp32"] > 3.9 * found["bytes_per_step"]["diloco/int8"] * 0.95
    assert cli.main(["plan", file, *flags]) == 0
    text = capsys.readouterr().out
    for part in (
        "memory of a rank",
        "rounds",
        "utilisation",
        "advice",
        "because",
        "for a utilisation of 90%",
        "assumed",
        "EUR",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"round_box": "speed"}, 'semi_sync.round_box = "speed": left out'),
        ({"late_work": "keep"}, 'semi_sync.late_work = "keep": left out'),
        ({}, None),
    ],
)
def test_what_the_plan_leaves_out_is_said(settings: dict, told: str | None, sites: list) -> None:
    plan = make_plan(with_settings(sites, **settings), Request(file="f", links=["1gbit,80ms"], steps=["1s"]))
    found = [line for line in plan.assumptions if "left out" in line]
    assert len(found) == (told is not None) and all(told in line for line in found)


def test_a_plan_of_sites_with_sources_says_what_it_leaves_out(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    table = '[[source]]\nname = "{}"\ndataset = "builtin:docs"\n'
    file.write_text(
        '[model]\nflavor = "tiny"\n'
        + table.format("x")
        + table.format("y")
        + '[[site]]\nname = "a"\n[[site]]\nname = "b"\n'
    )
    plan = make_plan(load_run(file, needs=()).sites, Request(file="f", links=["1gbit,80ms"], steps=["1s"]))
    assert any(line.startswith("data.source: left out") for line in plan.assumptions)
