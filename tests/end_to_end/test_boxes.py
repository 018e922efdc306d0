"""Boxed rounds of real sites: steps that are not taken, tokens of unequal sites, and a resume."""

from tests.end_to_end.forked import lighthouse, start_site
from tests.end_to_end.test_layouts import write_config

SITE_B = "\n[site.training]\nlocal_batch_size = 2\n"


def test_unequal_sites_fill_a_box_of_tokens(tmp_path, text_corpus):
    """Steps of 256 and 128 tokens, 512 tokens a round: 2 steps of 4 at one site and 4 at the other, from round 2 on."""
    with lighthouse(2) as url:
        config = write_config(tmp_path, ["a", "b"], [f'"{text_corpus}"'] * 2, {})
        text = config.read_text().replace(
            "sync_every = 2", 'sync_every = 4\nround_box = "tokens"\nround_box_size = 512'
        )
        config.write_text(text.replace("steps = 5", "steps = 12") + SITE_B)
        sites = [start_site(config, name, 1, url) for name in ("a", "b")]
        for site in sites:
            assert site.wait() == [0], site.log()[-3000:]
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1
    assert [line["step"] for line in sites[0].lines("round")] == [4, 8, 12]
    taken = [[line["step"] for line in site.lines("step")] for site in sites]
    assert taken == [[1, 2, 3, 4, 5, 6, 9, 10], list(range(1, 13))]
