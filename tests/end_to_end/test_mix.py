"""A mix of corpora in a real run: the shares of each step are read, changed in time, and resumed exactly."""

import json
import shutil

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import write_config
from tests.end_to_end.test_losses import trajectory


def train(config, *flags: str) -> SiteRun:
    with lighthouse(1) as url:
        site = start_site(config, "a", 1, url, "--training.global_batch_size=8", *flags)
        assert site.wait() == [0], site.log()[-3000:]
    return site


def test_a_mix_is_resumed_exactly_and_changes_at_its_step(tmp_path):
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    for name, letter in {"wiki": "w", "code": "c"}.items():
        texts = [letter * (30 + number % 17) + str(number) for number in range(200)]
        (corpora / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    mix = f'dataset = "{corpora}", mix = {{wiki = 0.75, code = 0.25}}'
    data = f"{{{mix}, mix_changes = [{{step = 4, mix = {{code = 1.0}}}}]}}"
    checkpoints = "[checkpoint]\nenable = true\ninterval = 3\nkeep_latest_k = 0\n[loss]\nby_source = true\n"
    config = write_config(tmp_path / "run", ["a"], [data], {}, checkpoints)
    run = train(config)
    whole = trajectory(run)
    for line, (_, loss, _) in zip(run.lines("loss"), whole, strict=True):
        parts = {name.partition("/")[2]: part for name, part in line.items() if name.startswith("cross_entropy/")}
        assert parts.keys() == ({"wiki", "code"} if line["step"] <= 4 else {"code"})
        assert min(parts.values()) <= loss * 1.00001 and max(parts.values()) >= loss * 0.99999
    folder = config.parent / "a"
    shutil.rmtree(folder / "checkpoint" / "step-5")
    (folder / "metrics.jsonl").unlink()
    assert trajectory(train(config)) == whole[3:]
    shutil.rmtree(folder / "checkpoint" / "step-5")
    (folder / "metrics.jsonl").unlink()
    write_config(config.parent, ["a"], [f"{{{mix}}}"], {}, checkpoints)
    other = trajectory(train(config))
    assert other[0] == whole[3] and other[1] != whole[4], "the change is at the fifth step"
    shutil.rmtree(folder / "checkpoint" / "step-5")
    write_config(config.parent, ["a"], [f'"{corpora / "wiki.jsonl"}"'], {}, checkpoints)
    assert "the place in the data (of another kind in the checkpoint)" in train(config).log()
