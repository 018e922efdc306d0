"""The [loss] section: losses by name, ours and the user's, and what is refused."""

import sys
from pathlib import Path

import pytest

from titan_ext.cli import main
from titan_ext.config.load import load_run, load_site
from titan_ext.config.resolved import dump_resolved, save_resolved
from titan_ext.errors import UserError
from titan_ext.losses import LOSSES

README = Path(__file__).parents[2] / "titan_ext" / "losses" / "README.md"


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    path = tmp_path / "anchors.jsonl"
    path.write_text('{"text": "one"}\n')
    return path


def write(folder: Path, loss: str, more: str = "") -> Path:
    path = folder / "run.toml"
    path.write_text(
        f'dump_folder = "{folder / "runs"}"\n[model]\nflavor = "tiny"\n{loss}\n'
        f'[[site]]\nname = "a"\ndata = "builtin:code"\n{more}\n[[site]]\nname = "b"\ndata = "builtin:code"\n'
    )
    return path


def adapt(anchors: Path | str, more: str = "") -> str:
    return f'[loss]\nname = "adapt"\n[loss.adapt]\nanchors = "{anchors}"\n{more}'


def test_a_loss_and_its_settings_come_from_the_file_and_go_into_the_record(tmp_path: Path, anchors: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "two"}\n')
    text = adapt(anchors, 'unit = "block"\nblock_length = 64')
    run = load_run(write(tmp_path, text, f'[site.loss.adapt]\nanchors = "{own}"\n'), needs=())
    first, second = (site.config.loss for site in run.sites)
    assert (first.anchors, second.anchors) == (str(own), str(anchors))
    assert first.unit == "block" and first.block_length == 64 and first.num_chunks == 8
    assert first.loss_fn.global_vocab_size == run.sites[0].config.model_spec.model.vocab_size
    site = run.sites[0]
    Path(site.config.dump_folder).mkdir(parents=True)
    again = load_site(save_resolved(site), needs=())
    assert again.config.loss == first and dump_resolved(again)["loss"]["adapt"]["unit"] == "block"


def test_a_z_loss_goes_with_any_loss_and_into_the_record(tmp_path: Path, anchors: Path) -> None:
    for number, text in enumerate(("", adapt(anchors))):
        folder = tmp_path / str(number)
        folder.mkdir()
        flags = ["--loss.z_loss=1e-4", "--loss.unigram_documents=3", "--loss.by_source"]
        site = load_run(write(folder, text), flags, needs=()).sites[0]
        Path(site.config.dump_folder).mkdir(parents=True)
        assert (site.config.loss.z_loss, site.config.loss.unigram_documents) == (1e-4, 3) and site.config.loss.by_source
        assert load_site(save_resolved(site), needs=()).config.loss == site.config.loss


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ("", None),
        ("standardize = true\n[semi_sync]\nmethod = 'none'", 100),
        ("standardize = true\nrefresh_every = 4", None),
        ("standardize = true\n[semi_sync]\nmethod = 'diloco'\nsync_every = 20", 20),
        ("standardize = true\nrefresh_after_sync = false\n[semi_sync]\nmethod = 'diloco'\nsync_every = 20", 100),
        ("standardize = true\n[semi_sync]\nmethod = 'diloco'\nsync_every = 4", None),
    ],
)
def test_standardised_scores_that_go_by_old_anchors_are_noted_with_the_cure(
    settings: str, steps: int | None, tmp_path: Path, anchors: Path
) -> None:
    notes = [
        each for each in load_site(write(tmp_path, adapt(anchors, settings)), "a", needs=()).notes if "adapt" in each
    ]
    assert len(notes) == (steps is not None)
    assert all(f"read every {steps} steps" in each and "refresh_every = 4" in each for each in notes)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ("block_length = 16", "block_length"),
        ('unit = "block"\nblock_length = 16', ""),
        ("standardize_decay = 0.5", "standardize_decay"),
        ("bm25_k1 = 2.0\nbm25_documents = 5", "bm25_k1, loss.adapt.bm25_documents"),
        ('score = "bm25"\nbm25_k1 = 2.0', ""),
        ('score = "bm25"\nrefresh_every = 7', "refresh_every"),
        ("scale_outer_weight = true", ""),
        ('scale_outer_weight = true\n[semi_sync]\nmethod = "none"', "scale_outer_weight"),
    ],
)
def test_settings_of_adapt_that_another_reading_leaves_unread_are_said(
    tmp_path: Path, anchors: Path, settings: str, keys: str
) -> None:
    notes = load_site(write(tmp_path, adapt(anchors, settings)), "a", needs=()).notes
    found = [note for note in notes if "loss.adapt" in note]
    assert [note.rpartition(": loss.adapt.")[2] for note in found] == ([keys] if keys else []), found


def test_a_loss_that_is_not_chunked_sees_the_sequence_at_once(tmp_path: Path, anchors: Path) -> None:
    site = load_site(write(tmp_path, adapt(anchors)), "a", ["--loss.chunked=false"], needs=())
    assert site.config.loss.num_chunks == 1


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ('[loss]\nname = "adpat"', [], r"loss.name.*must be one of cross_entropy, adapt.*did you mean .adapt."),
        ('[loss]\nname = "no.such.loss"', [], r"loss.name.*no module .no.such. can be imported"),
        ('[loss]\nname = "adapt"', [], r"loss.adapt.anchors: is missing"),
        ("ADAPT", ["--loss.adapt.tau=1"], r"loss.adapt.tau: unknown key"),
        ("ADAPT", ["--loss.adapt.num_chunks=2"], r"loss.adapt.num_chunks"),
        ("ADAPT", ["--loss.adapt.temperature=0"], r"loss.adapt.temperature.*above 0"),
        ("ADAPT", ["--loss.adapt.unit=word"], r"loss.adapt.unit"),
        ("ADAPT", ["--loss.name=cross_entropy"], r'loss.adapt.*read only with loss.name = "adapt"'),
        ("ADAPT", ["--loss.adapt.score=bm25", "--loss.adapt.center"], r"loss.adapt.center.*false with score"),
        ("", ["--loss.z_loss=-1"], r"loss.z_loss.*at least 0"),
        ("", ["--loss.unigram_documents=-1"], r"loss.unigram_documents.*at least 0"),
        ("", ["--loss.z_loss=1e-4", "--parallelism.context_parallel_degree=2"], r"context_parallel_degree"),
        ("ADAPT", ["--parallelism.context_parallel_degree=2"], r"context_parallel_degree.*adapt"),
        ("ADAPT", ["--debug.spmd_typechecking"], r"debug.spmd_typechecking.*adapt"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    tmp_path: Path, anchors: Path, text: str, flags: list[str], message: str
) -> None:
    path = write(tmp_path, adapt(anchors) if text == "ADAPT" else text)
    with pytest.raises(UserError, match=message) as caught:
        load_run(path, flags, needs=())
    assert "Traceback" not in str(caught.value)


def test_anchors_that_are_not_there_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(write(tmp_path, adapt(tmp_path / "nowhere.jsonl")))]) == 0
    assert "loss.adapt.anchors" in capsys.readouterr().out.split("missing on this machine:")[1]


def test_the_readmes_loss_works_from_outside_by_its_dotted_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = README.read_text().split("# my_package/later.py\n")[1].split("```")[0]
    (tmp_path / "my_losses").mkdir()
    (tmp_path / "my_losses" / "later.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with LOSSES.isolated():
        path = write(tmp_path, '[loss]\nname = "my_losses.later"\n[loss.later]\nwarmup = 32\n')
        site = load_site(path, "a", needs=())
        assert site.config.loss.warmup == 32
        loss = site.config.loss.build(compile_config=None)
        assert type(loss).__name__ == "Later" and loss.warmup == 32
        assert dump_resolved(site)["loss"]["name"] == "my_losses.later.later"
        with pytest.raises(UserError, match=r"loss.later.warm\b.*did you mean"):
            load_site(path, "a", ["--loss.later.warm=3"], needs=())
    for name in [name for name in sys.modules if name.startswith("my_losses")]:
        del sys.modules[name]
