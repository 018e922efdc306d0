"""torchtitan's features under the outer loop at two sites: each works, or is refused at the start in one line."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.end_to_end.file_runs import FileRun, train_in_turn
from tests.end_to_end.forked import SiteRun
from tests.end_to_end.test_layouts import write_config
from tests.features import DOCUMENT, ELSEWHERE, REFUSED, STEPS, TRAINED, Refused, Trained, document
from titan_ext.config import load_to_start
from titan_ext.errors import UserError

pytestmark = pytest.mark.timeout(900)
SITES = ("a", "b")


def file_of(cells: Sequence[Trained], folder: Path, corpus: Path) -> Path:
    data = [f'{{dataset = "{corpus}", seed = {seed}}}' for seed in (1, 2)]
    own = "".join(cell.text for cell in cells)
    path = write_config(folder / "layout", list(SITES), data, {})
    text = path.read_text().replace(
        "[optimizer]\nlr = 1e-3\n", "" if "param_groups" in own else "[optimizer]\nlr = 1e-2\n"
    )
    path = folder / f"{cells[0].stem}.toml"
    path.write_text(text.replace("[training]\n", f"{own}[training]\n", 1))
    return path


def train(cells: Sequence[Trained], folder: Path, corpus: Path) -> Path:
    """Train all cells of one number of ranks, run by run, each site in the same processes."""
    (ranks,) = {cell.ranks for cell in cells}
    by_run: dict[str, list[Trained]] = {}
    for cell in cells:
        by_run.setdefault(cell.stem, []).append(cell)
    runs = []
    for together in by_run.values():
        path, given = file_of(together, folder, corpus), [flag for cell in together for flag in cell.flags]
        for flags in (together[0].first, given) if together[0].first else (given,):
            own = [f"--training.steps={STEPS}", *dict.fromkeys(flags)]
            runs.append(FileRun(path=path, sites=SITES, flags=own))
    train_in_turn(runs, folder, ranks, timeout=800)
    return folder


def cells(ranks: int, slow: bool = False) -> list[Trained]:
    return [cell for cell in TRAINED if cell.ranks == ranks and cell.slow == slow]


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory, text_corpus) -> Iterator[Path]:
    yield train(cells(1), tmp_path_factory.mktemp("features"), text_corpus)


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory, text_corpus) -> Iterator[Path]:
    yield train(cells(2), tmp_path_factory.mktemp("features2"), text_corpus)


@pytest.fixture(scope="module")
def long_of_one_rank(tmp_path_factory, text_corpus) -> Iterator[Path]:
    yield train(cells(1, slow=True), tmp_path_factory.mktemp("features3"), text_corpus)


@pytest.fixture(scope="module")
def long_of_two_ranks(tmp_path_factory, text_corpus) -> Iterator[Path]:
    yield train(cells(2, slow=True), tmp_path_factory.mktemp("features4"), text_corpus)


def check(cell: Trained, folder: Path) -> None:
    sites = [SiteRun(name, folder / cell.stem, []) for name in SITES]
    for site in sites:
        assert not site.failure(), site.failure()
        losses = site.losses()
        assert len(losses) >= STEPS and all(map(math.isfinite, losses)) and min(losses[2:]) < losses[0], losses
        rounds = site.lines("round")
        assert rounds and all(line["committed"] and line["participants"] == 2 for line in rounds)
        assert cell.shows(site)
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1


@pytest.mark.parametrize("cell", cells(1), ids=lambda cell: cell.feature)
def test_a_feature_of_one_rank(cell, of_one_rank):
    check(cell, of_one_rank)


@pytest.mark.parametrize("cell", cells(2), ids=lambda cell: cell.feature)
def test_a_feature_of_two_ranks(cell, of_two_ranks):
    check(cell, of_two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells(1, slow=True), ids=lambda cell: cell.feature)
def test_a_feature_of_one_rank_that_takes_long(cell, long_of_one_rank):
    check(cell, long_of_one_rank)


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells(2, slow=True), ids=lambda cell: cell.feature)
def test_a_feature_of_two_ranks_that_takes_long(cell, long_of_two_ranks):
    check(cell, long_of_two_ranks)


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.feature)
def test_a_feature_that_is_refused(cell: Refused, tmp_path, text_corpus):
    if cell.without_gpu and torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    path = write_config(tmp_path, list(SITES), [f'"{text_corpus}"'] * 2, {})
    with pytest.raises(UserError) as refusal:
        load_to_start(path, None, list(cell.flags))
    lines = str(refusal.value).splitlines()
    assert all(cell.said in line for line in lines) and lines


def test_the_document_has_the_table_of_now():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert document(text) == text, "write it anew: python -m tests.features"
    names = [cell.feature for cell in (*TRAINED, *REFUSED, *ELSEWHERE)]
    assert len(set(names)) == len(names)
    root = Path(__file__).parents[2]
    assert all((root / cell.test).is_file() for cell in ELSEWHERE)
