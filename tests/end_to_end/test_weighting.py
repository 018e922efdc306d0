"""Sites that are weighed by the loss of the received model on text of their own."""

import json

import pytest

from tests.end_to_end.forked import lighthouse, start_site
from tests.end_to_end.test_layouts import write_config
from titan_ext import cli

EXTRA = """
[semi_sync.tilted]
held_out_tokens = 512
[checkpoint]
enable = true
interval = 2
"""


def test_the_loss_is_that_of_the_received_model_in_any_layout(tmp_path, text_corpus, capsys):
    """Two sites with the same text, one of them a pipeline, measure one loss: what ``titan-ext eval`` measures."""
    data = f'{{dataset = "{text_corpus}", split = "train", holdout_fraction = 0.3, share_index = 0, share_count = 1}}'
    with lighthouse(2) as url:
        config = write_config(tmp_path, ["a", "b"], [data] * 2, {}, EXTRA)
        text = config.read_text().replace('method = "diloco"', 'method = "diloco"\nweighting = "tilted"')
        config.write_text(text + "[site.parallelism]\npipeline_parallel_degree = 2\n")
        sites = [start_site(config, name, ranks, url) for name, ranks in (("a", 1), ("b", 2))]
        for site, ranks in zip(sites, (1, 2), strict=True):
            assert site.wait() == [0] * ranks, site.log()[-3000:]
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1
    rounds = [site.lines("round") for site in sites]
    measures = [line["measures"] for line in rounds[0]]
    assert measures == [line["measures"] for line in rounds[1]], "all sites know the same"
    for each in measures:
        assert each["loss of a"] == pytest.approx(each["loss of b"], rel=1e-3)
        assert each["weight of a"] == pytest.approx(0.5, rel=1e-2)
    assert measures[0]["loss of a"] > measures[1]["loss of a"]
    capsys.readouterr()
    (folder,) = (tmp_path / "a").rglob("step-2")
    flags = ["--site", "a", "--checkpoint", str(folder), "--tokens", "512"]
    assert cli.main(["eval", str(config), *flags]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"]
    assert found["loss"] == pytest.approx(measures[1]["loss of a"], rel=1e-3)


def test_text_that_is_held_out_is_asked_for(tmp_path, text_corpus, capsys):
    config = write_config(tmp_path, ["a"], [f'"{text_corpus}"'], {})
    config.write_text(config.read_text().replace("sync_every", 'weighting = "q_fair"\nsync_every'))
    assert cli.main(["check", str(config)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(config) in line and 'weighting = "q_fair"' in line and "holdout_fraction" in line
