"""Sites with data sources, as real processes: turns, the checkpoints between them, and a resume within a round."""

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.forked import lighthouse, start_site

RUN = """
[model]
flavor = "tiny"
[training]
steps = 8
seq_len = 32
local_batch_size = 1
[lr_scheduler]
warmup_steps = 1
stretch = 2.0
[checkpoint]
enable = true
interval = 2
[semi_sync]
method = "diloco"
sync_every = 4
sources_per_round = 3
source_optimizer = "stateful"
weighting = "tokens"
"""


def write(folder: Path, corpus: Path) -> Path:
    """North has three sources, each a file; south one that a pattern finds."""
    files = sorted(corpus.glob("*.txt"), key=lambda path: -path.stat().st_size)[:4]
    tables = "".join(f'[[site.source]]\nname = "{path.stem}"\ndataset = "{path}"\n' for path in files[:3])
    folder.mkdir(exist_ok=True)
    config = folder / "run.toml"
    south = f'[[site]]\nname = "south"\n[site.data]\nsources = "{files[3]}*"\n'
    config.write_text(f'{RUN}[[site]]\nname = "north"\n{tables}{south}')
    return config


def train(config: Path, *flags: str) -> dict[str, str]:
    """Train both sites; the hash of what they share at the end, and the log of north."""
    with lighthouse(2) as url:
        sites = [start_site(config, name, 1, url, *flags) for name in ("north", "south")]
        codes = [site.wait() for site in sites]
    assert codes == [[0], [0]], "".join(site.log()[-3000:] for site in sites)
    hashes = {site.summary()["shared_state_sha256"] for site in sites}
    assert len(hashes) == 1
    return {"hash": hashes.pop(), "log": sites[0].log(), "sites": sites}


def test_a_resume_between_two_sources_goes_on_bit_for_bit(tmp_path, text_corpus):
    straight = train(write(tmp_path / "straight", text_corpus))
    saved = sorted(each.name for each in (tmp_path / "straight/north/checkpoint").iterdir())
    assert saved == ["step-2", "step-4", "step-6", "step-8"], "of each step that of the last source"
    north, south = straight["sites"]
    steps = [line["step"] for line in north.lines("step")]
    assert len(steps) + len(south.lines("step")) == 2 * 3 * 4, "three sources in each of two rounds"
    assert steps.count(6) >= 2, "north has at least two of the three"
    sources = [line["source"] for line in north.lines("step")]
    assert [sources[start] for start in range(0, len(sources), 4) for _ in range(4)] == sources, (
        "whose turn of four it is"
    )
    assert set(sources) <= {path.stem for path in text_corpus.glob("*.txt")}
    assert all(line["participants"] >= 1 for line in north.lines("round"))
    resumed = write(tmp_path / "resumed", text_corpus)
    for name in ("north", "south"):
        shutil.copytree(tmp_path / f"straight/{name}/checkpoint/step-6", tmp_path / f"resumed/{name}/checkpoint/step-6")
    found = train(resumed)
    assert found["hash"] == straight["hash"]
    assert [line["step"] for line in found["sites"][0].lines("step")] == [7, 8], "only what was left of the last source"


def test_common_sources_are_placed_on_sites(tmp_path, text_corpus):
    files = sorted(text_corpus.glob("*.txt"), key=lambda path: -path.stat().st_size)[:3]
    tables = "".join(f'[[source]]\nname = "{path.stem}"\ndataset = "{path}"\n' for path in files)
    own = RUN.replace('source_optimizer = "stateful"', 'source_placement = "pollen"\nsource_clock = "round"')
    config = tmp_path / "run.toml"
    config.write_text(f'{own}{tables}[[site]]\nname = "north"\n[[site]]\nname = "south"\n')
    found = train(config)
    taken = [len(site.lines("step")) for site in found["sites"]]
    assert sum(taken) == 2 * 3 * 4 and all(each >= 4 for each in taken)
    rates = {line["lr"] for site in found["sites"] for line in site.lines("step")}
    assert len(rates) <= 4, "the learning rate goes by the steps of a round"


@pytest.mark.parametrize("flags", [["--semi_sync.method=local_adam", "--semi_sync.sources_per_round=none"]])
def test_a_method_that_averages_moments_is_refused_before_the_start(tmp_path, text_corpus, flags):
    from titan_ext.config import load_run
    from titan_ext.errors import UserError

    config = write(tmp_path, text_corpus)
    with pytest.raises(UserError, match="parameters alone"):
        load_run(config, [*flags, "--semi_sync.source_optimizer=none"])
