"""A loader that loads a state goes on with the very next batch, wherever the other one stopped."""

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from torch.distributed import checkpoint

from tests.data.corpora.sources import build_loader, documents_in, flat, write_lines
from titan_ext.data import TextDataLoader
from titan_ext.errors import UserError

SOURCES = ["lines", "text", "parquet", "stream"]


@pytest.fixture(params=SOURCES)
def corpus(request: pytest.FixtureRequest, tmp_path: Path, texts: list[str]) -> str:
    folder = tmp_path / "corpus"
    folder.mkdir()
    if request.param == "parquet":
        parquet.write_table(pyarrow.table({"text": texts}), folder / "x.parquet", row_group_size=6)
    elif request.param == "text":
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    else:
        for part in range(2):
            write_lines(folder / f"{part}.jsonl", texts[20 * part : 20 * part + 20])
    return f"hf:{folder}" if request.param == "stream" else str(folder)


def rest_after(state: dict[str, Any], count: int, loader: TextDataLoader) -> list[Any]:
    loader.load_state_dict(pickle.loads(pickle.dumps(state)))
    return [flat(batch) for batch in islice(loader, count)]


def test_resume_after_every_batch_of_more_than_two_epochs(corpus: str) -> None:
    settings = {"rank": 1, "world": 2, "seed": 3, "shuffle_buffer": 8}
    loader = build_loader(corpus, **settings)
    states, batches = [loader.state_dict()], []
    for batch in islice(loader, 60):
        batches.append(flat(batch))
        states.append(loader.state_dict())
    epoch = pickle.loads(pickle.loads(states[-1]["ranks"])["dp_rank_1"])["dataset_state"]["epoch"]
    assert epoch >= 2
    for stopped in range(0, 58):
        resumed = rest_after(states[stopped], 2, build_loader(corpus, **settings))
        assert resumed == batches[stopped : stopped + 2], f"stopped after batch {stopped}"


def test_resume_twice_equals_never_having_stopped(corpus: str) -> None:
    expected = [flat(batch) for batch in islice(build_loader(corpus, shuffle_buffer=8), 50)]
    found, state = [], None
    for _ in range(5):
        loader = build_loader(corpus, shuffle_buffer=8)
        if state is not None:
            loader.load_state_dict(state)
        found += [flat(batch) for batch in islice(loader, 10)]
        state = loader.state_dict()
    assert found == expected


def test_a_finite_pass_resumes_and_then_starts_anew(corpus: str) -> None:
    settings = {"infinite": False, "world": 2, "rank": 0, "shuffle_buffer": 8}
    loader = build_loader(corpus, **settings)
    batches, states = [], []
    for batch in loader:
        batches.append(flat(batch))
        states.append(loader.state_dict())
    assert len(batches) > 10
    for stopped in (1, 5, len(batches) - 1):
        again = build_loader(corpus, **settings)
        again.load_state_dict(states[stopped - 1])
        assert [flat(batch) for batch in again] == batches[stopped:]
        ended = build_loader(corpus, **settings)
        ended.load_state_dict(again.state_dict())
        assert [flat(batch) for batch in again] == batches
        assert list(ended) == [], "a run that comes back makes no second pass"
        assert [flat(batch) for batch in ended] == batches


def test_resume_with_worker_processes(lines: Path) -> None:
    settings = {"num_workers": 2, "rank": 1, "world": 2, "seq_len": 16}
    loader = build_loader(lines, **settings)
    batches, states = [], []
    for batch in islice(loader, 45):
        batches.append(flat(batch))
        states.append(loader.state_dict())
    for stopped in (1, 2, 23, 40):
        assert rest_after(states[stopped - 1], 4, build_loader(lines, **settings)) == batches[stopped : stopped + 4]


def test_the_state_is_small_and_plain(tmp_path: Path, texts: list[str]) -> None:
    sizes = []
    for count in (1, 50):
        path = write_lines(tmp_path / f"{count}.jsonl", texts * count)
        loader = build_loader(path, seq_len=512)
        next(iter(loader))
        state = loader.state_dict()
        assert sorted(state) == ["ranks", "settings"]
        sizes.append(len(state["ranks"]))
    assert max(sizes) < 1000 and abs(sizes[0] - sizes[1]) < 10


def test_a_state_of_another_order_is_refused(lines: Path, tmp_path: Path, texts: list[str]) -> None:
    state = build_loader(lines, seed=1).state_dict()
    longer = write_lines(tmp_path / "longer.jsonl", [*texts, "more"])
    for other, names in [
        (build_loader(lines, seed=2), ["seed was 1, is 2"]),
        (build_loader(longer, seed=1), ["documents was 40, is 41"]),
    ]:
        with pytest.raises(UserError, match="exclude_from_loading") as raised:
            other.load_state_dict(state)
        assert all(name in str(raised.value) for name in names) and "\n" not in str(raised.value)


def test_a_stream_of_another_number_of_ranks_is_refused(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "stream").mkdir()
    write_lines(tmp_path / "stream" / "0.jsonl", texts)
    loader = build_loader(f"hf:{tmp_path / 'stream'}", world=2)
    next(iter(loader))
    with pytest.raises(UserError, match="dp_world_size was 2, is 1"):
        build_loader(f"hf:{tmp_path / 'stream'}").load_state_dict(loader.state_dict())


def of_the_site(loaders: list[TextDataLoader]) -> dict[str, Any]:
    """The state as the ranks of a site save it together."""
    states = [loader.state_dict() for loader in loaders]
    ranks = {key: value for state in states for key, value in pickle.loads(state["ranks"]).items()}
    return states[0] | {"ranks": pickle.dumps(ranks)}


@pytest.mark.parametrize("batches", [0, 3, 7])
@pytest.mark.parametrize(
    "before, now, infinite",
    [
        *(((2, 0), (1, 0), infinite) for infinite in (True, False)),
        *(((1, 0), (3, 0), infinite) for infinite in (True, False)),
        *(((3, 0), (2, 0), infinite) for infinite in (True, False)),
        ((1, 2), (2, 1), True),
        ((1, 0), (1, 3), True),
    ],
)
def test_another_number_of_readers_misses_no_document(
    before: tuple[int, int], now: tuple[int, int], infinite: bool, batches: int, lines: Path, texts: list[str]
) -> None:
    """Readers are ranks and their loader workers."""

    def readers(world: int, workers: int) -> list[TextDataLoader]:
        options = {"world": world, "num_workers": workers, "infinite": infinite, "batch": 1}
        return [build_loader(lines, rank=rank, **options) for rank in range(world)]

    def read(loaders: list[TextDataLoader], count: int) -> list[str]:
        found = [list(islice(iter(loader), count)) for loader in loaders]
        if infinite:
            workers = max(1, loaders[0].num_workers)
            return [text for each in found for worker in range(workers) for text in documents_in(each[worker::workers])]
        return documents_in(batch for turn in zip(*found) for batch in turn)

    first, second = readers(*before), readers(*now)
    seen = read(first, batches)
    state = of_the_site(first)
    for loader in second:
        loader.load_state_dict(state)
    assert of_the_site(second)["settings"] != state["settings"]
    seen += read(second, 200 if infinite else 10**6)
    # At most one is cut in two, and what does not fill the last turn of a finite pass is dropped.
    assert len(set(texts) - set(seen)) <= (1 if infinite else 4)


def test_another_number_of_sites_goes_on_at_the_same_part_of_the_epoch(lines: Path) -> None:
    loader = build_loader(lines, share_index=1, share_count=2)
    list(islice(iter(loader), 6))
    state = pickle.loads(pickle.loads(loader.state_dict()["ranks"])["dp_rank_0"])["dataset_state"]
    other = build_loader(lines, share_index=2, share_count=4)
    other.load_state_dict(loader.state_dict())
    next(iter(other))
    moved = pickle.loads(pickle.loads(other.state_dict()["ranks"])["dp_rank_0"])["dataset_state"]
    assert state["place"] >= 4 and state["place"] // 2 <= moved["place"] <= state["place"] // 2 + 2


def test_the_state_goes_through_a_distributed_checkpoint(lines: Path, tmp_path: Path) -> None:
    loader = build_loader(lines)
    batches = [flat(batch) for batch in islice(loader, 7)]
    checkpoint.save({"dataloader": loader}, checkpoint_id=tmp_path / "step-7", no_dist=True)
    again = build_loader(lines)
    checkpoint.load({"dataloader": again}, checkpoint_id=tmp_path / "step-7", no_dist=True)
    assert [*batches, *(flat(batch) for batch in islice(again, 7))] == [
        flat(batch) for batch in islice(build_loader(lines), 14)
    ]


def test_an_empty_state_is_a_fresh_start(lines: Path) -> None:
    loader = build_loader(lines)
    loader.load_state_dict({})
    assert flat(next(iter(loader))) == flat(next(iter(build_loader(lines))))
    assert json.loads(loader.state_dict()["settings"])["documents"] == 40
