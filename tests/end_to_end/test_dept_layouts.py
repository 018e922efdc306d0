"""Masked heads on every parallel layout: losses and gradients are those of a single process."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.forked import start_ranks
from tests.end_to_end.test_abbie_layouts import ROWS, STEPS, fill, microbatches
from tests.end_to_end.test_layouts import LAYOUTS, write_config

TABLE = 264
UNTIED = "--model.enable_weight_tying=false"
# Under tensor parallelism with 100 used rows the second rank's share of the table is all padding.
CASES = {
    "some padding": (201, [UNTIED]),
    "most is padding": (100, [UNTIED]),
    "no padding": (TABLE, [UNTIED]),
    "loss of whole sequences": (100, [UNTIED, "--loss.chunked=false"]),
}
# torchtitan ties no weights across pipeline stages.
TIED = CASES | {"tied": (201, []), "tied, most is padding": (100, ["--loss.chunked=false"])}
COMPILED = {"eager": (201, []), "compiled": (201, ["--compile.enable"])}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_corpus) -> dict[str, dict]:
    return run("plain", tmp_path_factory.mktemp("alone"), text_corpus, TIED)


@pytest.mark.parametrize(
    "layout, backend",
    [
        pytest.param("fsdp2", "spmd_types", marks=pytest.mark.slow),
        pytest.param("tp2", "spmd_types", marks=pytest.mark.slow),
        ("pp2", "spmd_types"),
        pytest.param("tp2", "partial_dtensor", marks=pytest.mark.slow),
        pytest.param("fsdp2_tp2", "spmd_types", marks=pytest.mark.slow),
    ],
)
def test_layouts_equal_a_single_process(layout, backend, alone, tmp_path, text_corpus):
    results = run(layout, tmp_path, text_corpus, CASES if layout == "pp2" else TIED, backend)
    for name, result in results.items():
        assert result["losses"] == pytest.approx(alone[name]["losses"], rel=1e-5), name
        assert result["norms"] == pytest.approx(alone[name]["norms"], rel=1e-4), name
        assert result["padding_kept"], name


def test_padding_gets_no_gradient_and_matters_to_the_loss(alone):
    assert all(result["padding_kept"] for result in alone.values())
    assert alone["most is padding"]["losses"] == pytest.approx(alone["loss of whole sequences"]["losses"], rel=1e-6)
    assert len({alone[name]["losses"][0] for name in ("some padding", "most is padding", "no padding")}) == 3


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones(tmp_path, text_corpus):
    results = run("plain", tmp_path, text_corpus, COMPILED)
    assert results["compiled"]["losses"] == pytest.approx(results["eager"]["losses"], rel=1e-5)
    assert results["compiled"]["norms"] == pytest.approx(results["eager"]["norms"], rel=1e-4)


def run(layout: str, folder: Path, corpus: Path, cases: dict, backend: str = "spmd_types") -> dict[str, dict]:
    """Train every case on a layout; the last rank of a pipeline is the one with the head and the loss."""
    ranks, parallelism = LAYOUTS[layout]
    config = write_config(folder, ["a"], [f'"{corpus}"'], parallelism)
    site = start_ranks(config, "a", ranks, "http://127.0.0.1:1", train_cases, config, folder, cases, backend)
    assert site.wait() == [0] * ranks, site.log()[-3000:]
    return json.loads((folder / f"results_{ranks - 1}.json").read_text())


def train_cases(config: Path, folder: Path, cases: dict[str, tuple[int, list[str]]], backend: str) -> None:
    """Some steps of each case at one rank, which leaves what it saw."""
    from titan_ext.trainer.trainer import Trainer

    results = {}
    for name, (used, flags) in cases.items():
        given = [f"--model.used_vocab_size={used}", f"--parallelism.spmd_backend={backend}", *flags]
        trainer = build(config, folder, given)
        # A process has one mesh; the trainers that follow take the first's.
        Trainer.init_distributed = lambda self, dims=trainer.parallel_dims: dims
        results[name] = train(trainer, used)
    (folder / f"results_{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    os._exit(0)


def build(config: Path, folder: Path, flags: list[str]) -> Any:
    from titan_ext.config import load_site

    shards = load_site(config, "a").layout.batch
    model = ["--model.name=dept", f"--model.vocab_size={TABLE}", "--optimizer.weight_decay=0"]
    fixed = [f"--dump_folder={folder}", "--semi_sync.method=none", f"--training.local_batch_size={ROWS // shards}"]
    trainer = load_site(config, "a", [*fixed, *model, *flags]).config.build()
    for part in trainer.model_parts:
        for name, parameter in part.named_parameters():
            fill(name, parameter.detach())
    return trainer


def train(trainer: Any, used: int) -> dict[str, Any]:
    """Loss and gradient norm of each step, and whether the head's rows of padding are what they were."""
    lines = []
    trainer.metrics_processor.log = lambda *values, **_: lines.append(values)
    before = head_rows(trainer)
    for trainer.step in range(1, STEPS + 1):
        trainer.train_step(used_tokens(trainer, used))
    after = head_rows(trainer)
    return {
        "losses": [loss for _, loss, _, _ in lines],
        "norms": [norm for _, _, _, norm in lines],
        "padding_kept": torch.equal(before[used:], after[used:]) and not torch.equal(before[:used], after[:used]),
    }


def head_rows(trainer: Any) -> torch.Tensor:
    """The whole head ``[rows, dim]``; on a pipeline's other stages, which have none, a stand-in that changes."""
    head = trainer.model_parts[-1].lm_head
    return torch.rand(TABLE, 1) if head is None else head.weight.detach().full_tensor().clone()


def used_tokens(trainer: Any, used: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    for inputs, labels in microbatches(trainer):
        yield inputs | {"input": inputs["input"] % used}, labels % used
