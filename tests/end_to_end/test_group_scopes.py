"""Embeddings that only the sites of one language share, on sites that cut the model in different ways."""

import json

import pytest

from tests.end_to_end.forked import lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from titan_ext.config import load_run
from titan_ext.config.cost.cost import site_cost
from titan_ext.config.model import parameter_shapes

_SCOPE = """
[[semi_sync.scopes]]
name = "embeddings"
parameters = ["tok_embeddings.*", "lm_head.*"]
shared = "group"
group = "language"
"""


@pytest.mark.parametrize(
    "layouts",
    [("fsdp2", "pp2", "plain"), pytest.param(("fsdp2", "fsdp2", "fsdp2"), marks=pytest.mark.slow)],
    ids=["leaders", "ranks"],
)
def test_languages_share_their_embeddings(layouts, tmp_path, text_corpus):
    data = [f'{{dataset = "{text_corpus}", seed = {seed}}}' for seed in (1, 2, 3)]
    config = write_config(tmp_path, ["a", "b", "c"], data, {}, _SCOPE)
    text = config.read_text()
    for name, layout, language in zip("abc", layouts, ("de", "de", "en"), strict=True):
        ranks, degrees = LAYOUTS[layout]
        table = ", ".join(f"{key} = {value}" for key, value in degrees.items())
        own = f'nproc = {ranks}\nlabels = {{language = "{language}"}}\nparallelism = {{{table}}}\n'
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\n{own}')
    config.write_text(text)
    with lighthouse(3) as url:
        sites = [start_site(config, name, LAYOUTS[layout][0], url) for name, layout in zip("abc", layouts, strict=True)]
        for site, layout in zip(sites, layouts, strict=True):
            assert site.wait() == [0] * LAYOUTS[layout][0], site.log()[-3000:]
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1
    for lines in zip(*(_commits(site) for site in sites), strict=True):
        assert len({line["digest"] for line in lines}) == 1
        of_a, of_b, of_c = (line["group_digests"]["language"] for line in lines)
        assert of_a == of_b != of_c
    for site, loaded in zip(sites, load_run(config).sites, strict=True):
        shapes = parameter_shapes(loaded.config).items()
        tables = sum(shape.numel() for name, shape in shapes if name.split(".")[0] in ("tok_embeddings", "lm_head"))
        # At the start the first of a group gives the other its values and its outer momentum.
        given = 2 * 4 * tables if site.name == "a" else 0
        sent = sum(line["bytes_sent"] for line in site.lines("round"))
        assert sent == pytest.approx(site_cost(loaded).run_bytes + given, rel=0.02)


def _commits(site) -> list[dict]:
    lines = [json.loads(line) for line in (site.folder / site.name / "commits.jsonl").read_text().splitlines()]
    return list({line["round"]: line for line in lines}.values())  # each rank writes its own
