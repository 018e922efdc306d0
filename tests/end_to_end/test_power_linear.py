"""Layers under a power of 1, in real processes: a run in which nothing is pruned is the plain one."""

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_losses import trajectory

UNDER_A_POWER = '[[model.converters]]\nname = "power_linear"\nexponent = 1.0\n'


def train(folder, corpus, layout: str, extra: str, *flags: str) -> SiteRun:
    ranks, parallelism = LAYOUTS[layout]
    config = write_config(folder, ["a"], [f'{{dataset = "{corpus}"}}'], parallelism, extra)
    with lighthouse(1) as url:
        site = start_site(config, "a", ranks, url, "--training.global_batch_size=16", *flags)
        assert site.wait() == [0] * ranks, site.log()[-3000:]
    return site


@pytest.mark.parametrize(
    "layout", ["plain", *(pytest.param(each, marks=pytest.mark.slow) for each in ("fsdp2", "tp2", "pp2"))]
)
def test_a_power_of_1_and_a_sparsity_of_0_train_as_the_plain_run(layout, tmp_path, text_corpus):
    plain = train(tmp_path / "plain", text_corpus, layout, "", "--semi_sync.method=local_sgd")
    flags = ("--semi_sync.method=sparsyfed", "--semi_sync.sparsyfed.sparsity=0")
    power = train(tmp_path / "power", text_corpus, layout, UNDER_A_POWER, *flags)
    assert trajectory(power) == trajectory(plain)
    assert power.summary()["shared_state_sha256"] == plain.summary()["shared_state_sha256"]
