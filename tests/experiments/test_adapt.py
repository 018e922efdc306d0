"""``titan-ext bench adapt`` at toy size."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from tests.experiments.wrong_options import assert_one_line
from titan_ext import cli
from titan_ext.errors import UserError
from titan_ext.experiments.adapt.arms import ARMS, SOURCES, Settings
from titan_ext.experiments.adapt.text import anchors, check_text, evaluation, mixture, texts_of
from titan_ext.experiments.adapt.train import WeightedTraining, build_loss
from titan_ext.experiments.models import loss_of, small_llama
from titan_ext.experiments.text import Batch
from titan_ext.losses import Tokens

COMMAND = ["bench", "adapt", "--dim", "32", "--layers", "1", "--steps", "4", "--sync-every", "2", "--batch", "8"]
COMMAND += ["--anchors-every", "1", "--length", "16", "--seeds", "1", "--learning-rates", "4e-3", "--workers", "2"]
SETTINGS = Settings(
    corpus="",
    targets="a1,b1",
    off_topic="c1",
    own_share=0.4,
    dim=32,
    layers=1,
    steps=4,
    batch=64,
    length=40,
    sync_every=2,
    anchors_every=1,
    device="cpu",
)


def test_a_row_for_each_arm_with_the_weights_of_each_source(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.main([*COMMAND, "--plot", str(tmp_path / "plot")]) == 0
    assert (tmp_path / "plot.png").stat().st_size and (tmp_path / "plot.svg").stat().st_size
    lines = capsys.readouterr().out.strip().splitlines()
    figures = json.loads(lines[-1])
    rows = {row["label"]: row for row in figures["rows"]}
    assert list(rows) == list(ARMS) and all(any(line.startswith(arm) for line in lines) for arm in ARMS)
    for arm, row in rows.items():
        assert 0 < row["loss"] < 10
        assert len(row["curve"]) == (0 if "uniform" in arm or "oracle" in arm else 2)
        for weights in row["curve"]:
            assert len(weights) == len(SOURCES) and all(each is None or 0 <= each <= 1 for each in weights)
    assert rows["uniform"]["less"] == rows["diloco_uniform"]["less"] == 0.0
    assert len({row["loss"] for row in rows.values()}) == len(ARMS)
    assert len(figures["claims"]) >= 12


def test_a_folder_of_languages_is_read(corpus):
    settings = replace(SETTINGS, corpus=str(corpus), targets="latin,greek", off_topic="cyrillic", batch=8)
    check_text(settings)
    of_site = list(islice(mixture(settings, 1, 0), 20))
    seen = {source: set() for source in range(len(SOURCES))}
    for batch in of_site:
        for text, source in zip(texts_of([batch]), Tokens.unpack(batch.labels).source[:, 0].tolist()):
            seen[source] |= set(text)
    for source, letters in enumerate(("αβγδεζηθ", "abcdefgh", "абвгдежз")):
        assert set(letters) <= seen[source] <= set(letters) | {" ", "\ufffd"}
    with pytest.raises(UserError, match="too short"):
        check_text(replace(settings, length=200))


def test_a_stream_is_mixed_by_shares_and_anchors_stand_in_no_other_text():
    batches = list(islice(mixture(SETTINGS, 0, 0), 10))
    source = Tokens.unpack(batches[0].labels).source
    assert (source == source[:, :1]).all(), "a sequence is of one source"
    counts = sum(torch.bincount(Tokens.unpack(each.labels).source[:, 0], minlength=4) for each in batches)
    assert (counts / counts.sum() - torch.tensor([0.4, 0.2, 0.2, 0.2])).abs().max() < 0.06
    held = [set(anchors(SETTINGS, "a1")), set(texts_of(evaluation(SETTINGS, "a1"))), set(texts_of(batches))]
    assert all(held) and not held[0] & held[1] and not (held[0] | held[1]) & held[2]
    again, elsewhere = next(mixture(SETTINGS, 0, 0)), next(mixture(SETTINGS, 1, 0))
    assert torch.equal(again.labels, batches[0].labels) and not torch.equal(elsewhere.inputs, again.inputs)


@pytest.mark.parametrize(("arm", "counted"), [("uniform", 4), ("oracle", 1), ("diloco_oracle_shared", 2)])
def test_the_sources_that_count_are_those_of_the_arm(arm, counted, tmp_path):
    model, batch = small_llama(SETTINGS, 0), next(mixture(SETTINGS, 0, 0))
    tokens = Tokens.unpack(batch.labels)
    plain = Batch(batch.inputs, tokens.labels, batch.positions)
    with torch.no_grad():
        logits = model(batch.inputs, batch.positions, model.get_attention_masks(batch.positions))
        each = F.cross_entropy(logits.flatten(0, 1), tokens.labels.flatten(), reduction="none")
        whole = loss_of(model, plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = build_loss(SETTINGS, ARMS[arm], 0, tmp_path)
    site = WeightedTraining(model, optimizer, lambda step: 1.0, loss, lambda: iter(()), SETTINGS)
    expected = (each * (tokens.source.flatten() < counted)).sum() / len(each)
    torch.testing.assert_close(site.loss_of(batch).detach(), expected)
    with torch.no_grad():
        torch.testing.assert_close(site.loss_of(plain), whole)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--targets", "a1"], "--targets"),
        (["--targets", "a1,a1"], "--targets"),
        (["--off-topic", "b1"], "--off-topic"),
        (["--own-share", "1.0"], "--own-share"),
        (["--own-share", "nan"], "--own-share"),
        (["--anchors-every", "3"], "--anchors-every"),
        (["--steps", "5"], "--steps"),
        (["--corpus", "/no/such/folder"], "--corpus"),
        (["--learning-rates", "0"], "--learning-rates"),
    ],
)
def test_a_wrong_option_is_one_line(flags, said, capsys):
    assert_one_line([*COMMAND, *flags], said, capsys)
