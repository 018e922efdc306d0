"""``titan-ext bench sources``: every source trains once a round, and memory does not go with their number."""

import json

from titan_ext import cli
from titan_ext.bench.sources import source_sizes

FLAGS = "--sources 300 --few 10 --rounds 2 --dim 64 --batch 2 --most-batches 4"


def test_memory_is_that_of_the_virtual_sites(capsys):
    assert cli.main(["bench", "sources", *FLAGS.split()]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    few, dealt, placed = figures["rows"]
    assert few["sources"] == 10 and dealt["sources"] == placed["sources"] == 300
    assert dealt["batches_a_round"] == placed["batches_a_round"] == sum(source_sizes(300, 4))
    # A copy of the model for each source would be 300 times 8,320 parameters of 4 bytes: 9.5 MiB.
    assert placed["beyond_start_mib"] - few["beyond_start_mib"] < 8
    assert all(0 <= row["idle"] <= 1 and row["seconds_a_round"] > 0 for row in figures["rows"])


def test_more_few_than_all_is_one_line(capsys):
    assert cli.main(["bench", "sources", "--sources", "5", "--few", "6"]) == 2
    assert "--few 6: must be at most --sources (5)" in capsys.readouterr().err
