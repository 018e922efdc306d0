"""``titan-ext personalize`` on a checkpoint of a real run: what moves, and what is measured."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from tests.end_to_end.forked import SiteRun, lighthouse, start_ranks, start_site
from tests.end_to_end.test_layouts import write_config
from tests.object_store import S3
from titan_ext.cli import main
from titan_ext.config import load_site
from titan_ext.errors import UserError
from titan_ext.object_store import file_system
from titan_ext.trainer.personalization import WAYS, adapted_config


def weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    prefixes = ("tok_embeddings.", "layers.", "norm.", "lm_head.")
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if name.startswith(prefixes) and hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader)
    return state


def personalize(config: Path, *arguments: str) -> SiteRun:
    return start_ranks(config, "a", 1, "", _call, [str(config), "--site=a", *arguments])


def _call(arguments: list[str]) -> None:
    from titan_ext.cli import main

    raise SystemExit(main(["personalize", *arguments]))


@pytest.mark.slow
@pytest.mark.timeout(900)  # five trainings, one after another
def test_each_way_goes_on_from_the_checkpoint_and_moves_what_it_should(tmp_path, text_corpus):
    data = f'{{dataset = "{text_corpus}", split = "train", holdout_fraction = 0.1}}'
    config = write_config(tmp_path, ["a"], [data], {}, "[checkpoint]\nenable = true\ninterval = 5\n")
    with lighthouse(1) as url:
        site = start_site(config, "a", 1, url)
        assert site.wait() == [0], site.log()[-3000:]
    out = tmp_path / "adapted"
    flags = [f"--dump_folder={tmp_path}", f"--out={out}", "--steps=4", "--lr=1e-2", "--tokens=2000"]
    found = personalize(config, *flags, "--by=fine-tune,freeze,ewc,distillation", "--strength=1.0")
    assert found.wait(600) == [0], found.log()[-3000:]
    report = json.loads([line for line in found.log().splitlines() if line.startswith('{"site"')][-1])
    assert [row["way"] for row in report["ways"]] == ["none", "fine-tune", "freeze", "ewc", "distillation"]
    before = weights(tmp_path / "a" / "checkpoint" / "step-5")
    assert before
    distance = {}
    for row in report["ways"][1:]:
        after = weights(out / row["way"] / "checkpoint" / "step-4")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == ({"lm_head.weight"} if row["way"] == "freeze" else set(before)), row["way"]
        distance[row["way"]] = sum((after[name] - before[name]).square().sum().item() for name in before) ** 0.5
        assert row["gain"] == report["ways"][0]["loss"] - row["loss"]
    assert distance["ewc"] < 1.1 * distance["fine-tune"]
    assert len(set(distance.values())) == 4
    again = personalize(config, *flags, "--by=freeze")
    assert again.wait() != [0] and "is there already" in again.log()


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket_is_adapted_as_one_in_a_folder(tmp_path, text_corpus, s3: S3):
    data = f'{{dataset = "{text_corpus}", split = "train", holdout_fraction = 0.1}}'
    config = write_config(tmp_path, ["a"], [data], {}, "[checkpoint]\nenable = true\ninterval = 5\n")
    with lighthouse(1) as url:
        site = start_site(config, "a", 1, url)
        assert site.wait() == [0], site.log()[-3000:]
    folder = tmp_path / "a" / "checkpoint" / "step-5"
    for path in folder.iterdir():
        file_system("s3://").pipe_file(f"s3://bucket/run/a/checkpoint/step-5/{path.name}", path.read_bytes())
    losses = []
    for name, place in (("local", folder), ("stored", "s3://bucket/run/a/checkpoint")):
        flags = [f"--out={tmp_path / name}", "--steps=2", "--lr=1e-2", "--tokens=2000", "--by=distillation"]
        found = personalize(config, f"--dump_folder={tmp_path}", f"--checkpoint={place}", *flags)
        assert found.wait(300) == [0], found.log()[-3000:]
        report = json.loads([line for line in found.log().splitlines() if line.startswith('{"site"')][-1])
        losses.append([row["loss"] for row in report["ways"]])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_what_is_adapted_goes_to_a_new_folder_of_this_machine(tmp_path, capsys):
    (tmp_path / "ewc").mkdir()
    assert main(["personalize", "FILE.toml", f"--out={tmp_path}", "--by=freeze,ewc"]) == 2
    assert f"--out {tmp_path / 'ewc'}: is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["personalize", "FILE.toml", "--out=s3://bucket/adapted"])
    assert "s3://bucket/adapted: must be on this machine, not a URL" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["personalize", "FILE.toml", f"--out={tmp_path / 'file' / 'below'}"]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def adapted(tmp_path, way="ewc", strength=None, flags=()):
    config = load_site(write_config(tmp_path, ["a"], ['"builtin:docs"'], {}, ""), "a", flags).config
    checkpoint, folder = Path("runs/a/checkpoint/step-5"), tmp_path / "adapted"
    return adapted_config(config, checkpoint, folder, WAYS[way], steps=4, lr=1e-2, strength=strength)


def test_a_checkpoint_is_found_whatever_the_path_of_its_run(tmp_path):
    assert adapted(tmp_path).checkpoint.initial_load_path == str(Path("runs/a/checkpoint/step-5").absolute())


def test_what_cannot_be_adapted_is_refused_before_anything_trains(tmp_path, capsys):
    with pytest.raises(UserError, match="--strength 2 of distillation: must be from 0 to 1"):
        adapted(tmp_path, "distillation", 2.0)
    sources = '--data.source=[{name = "x", dataset = "builtin:docs"}]'
    with pytest.raises(UserError, match="data.source: a site is adapted to one corpus"):
        adapted(tmp_path, flags=[sources, "--data.dataset="])
    assert adapted(tmp_path, flags=["--data.source=[]", "--data.sources=", "--data.dataset=builtin:code"])
    for flag, words in (
        ("--steps=0", "--steps 0: must be at least 1"),
        ("--weights=average", "--weights average: must be"),
    ):
        assert main(["personalize", "FILE.toml", f"--out={tmp_path / 'new'}", flag]) == 2
        assert words in capsys.readouterr().err
