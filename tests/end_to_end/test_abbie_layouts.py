"""AbbIE on every parallel layout: losses and gradients are those of a single process."""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate

from tests.end_to_end.file_runs import FileRun, train_in_turn
from tests.end_to_end.forked import lighthouse, start_ranks, start_site
from tests.end_to_end.method_runs import CASES as METHODS
from tests.end_to_end.method_runs import run_cases
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_runs import one_line, own_data

STEPS, ROWS, LENGTH = 3, 4, 64
CASES = {
    "D": [],
    "C": ["--model.skip=none", "--model.iterations=3"],
    "sampled": ["--model.skip=input", "--model.iteration_sampling=uniform", "--model.iterations=3"],
    "standard": ["--model.flavor=tiny-standard"],
    "depth": ["--model.flavor=tiny-depth"],
    "fp32 stream": ["--model.fp32_residual=true"],
    "recomputed": ["--activation_checkpoint.mode=full"],
}
PLAIN = {"D": CASES["D"], "compiled": ["--compile.enable"]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_corpus) -> dict[str, dict]:
    return run("plain", tmp_path_factory.mktemp("alone"), text_corpus, CASES)


@pytest.mark.parametrize(
    "layout",
    ["pp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "fsdp2", "fsdp2_tp2", "fsdp2_pp2"))],
)
def test_layouts_equal_a_single_process(layout, alone, tmp_path, text_corpus):
    results = run(layout, tmp_path, text_corpus, CASES)
    for name in CASES:
        assert results[name]["iterations"] == alone[name]["iterations"]
        assert results[name]["losses"] == pytest.approx(alone[name]["losses"], rel=1e-5), name
        assert results[name]["norms"] == pytest.approx(alone[name]["norms"], rel=1e-4), name


def test_what_recomputation_and_sampling_change(alone):
    assert alone["recomputed"] == alone["fp32 stream"] == alone["D"]
    assert len(set(alone["sampled"]["iterations"])) > 1
    firsts = {name: alone[name]["losses"][0] for name in ("D", "C", "sampled", "standard", "depth")}
    assert len(set(firsts.values())) == len(firsts), firsts


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones(tmp_path, text_corpus):
    results = run("plain", tmp_path, text_corpus, PLAIN)
    assert results["compiled"]["losses"] == pytest.approx(results["D"]["losses"], rel=1e-5)
    assert results["compiled"]["norms"] == pytest.approx(results["D"]["norms"], rel=1e-4)


SAMPLED = ["--model.name=abbie", "--model.iteration_sampling=uniform", "--lr_scheduler.total_steps=8"]


@pytest.mark.slow
def test_two_sites_resume_bit_for_bit_with_sampled_iterations(tmp_path, text_corpus):
    """The step decides what is drawn, so a resumed run draws what it would have drawn."""
    flags = [*SAMPLED, "--semi_sync.method=des_loc", "--checkpoint.interval=4"]

    def run_of(name, *more):
        config = write_config(tmp_path / "file", ["a", "b"], own_data(text_corpus), {}).rename(
            tmp_path / f"{name}.toml"
        )
        return FileRun(path=config, sites=("a", "b"), flags=[*flags, *more])

    straight, _, resumed = train_in_turn(
        [
            run_of("straight", "--training.steps=8"),
            run_of("stopped", "--training.steps=4", "--checkpoint.enable"),
            run_of("stopped", "--training.steps=8", "--checkpoint.enable"),
        ],
        tmp_path,
        1,
    )
    assert not any(site.failure() for site in (*straight, *resumed))
    assert len({site.summary()["shared_state_sha256"] for site in (*straight, *resumed)}) == 1
    for whole, halves in zip(straight, resumed):
        assert halves.losses() == whole.losses()


@pytest.mark.slow
@pytest.mark.parametrize("flavor", ["tiny", "tiny-depth"])
def test_every_method_syncs_it(flavor, tmp_path, text_corpus):
    ranks, parallelism = LAYOUTS["fsdp2"]
    config = write_config(tmp_path, ["a", "b"], [f'"{text_corpus}"'] * 2, parallelism)
    config.write_text(config.read_text().replace('flavor = "tiny"', f'name = "abbie"\nflavor = "{flavor}"'))
    with lighthouse(2) as url:
        sites = [start_ranks(config, name, ranks, url, run_cases, config, name, tmp_path) for name in ("a", "b")]
        for site in sites:
            assert site.wait() == [0] * ranks, site.log()[-3000:]
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b"))
    for method in METHODS:
        assert first[method]["sha256"] == second[method]["sha256"], method


def test_a_cut_through_the_body_is_one_line_before_training(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {"pipeline_parallel_degree": 2})
    stages = '[["tok_embeddings", "layers.0", "layers.1"], ["layers.2", "layers.3", "norm", "lm_head"]]'
    flags = ["--model.name=abbie", "--semi_sync.method=none", f"--parallelism.module_fqns_per_model_part={stages}"]
    site = start_site(config, "a", 2, "http://127.0.0.1:1", *flags)
    assert site.wait() == [2, 2], site.log()[-3000:]
    line = one_line(site)
    assert "parallelism.module_fqns_per_model_part" in line and "layers.2 on stage 1" in line


def run(layout: str, folder: Path, corpus: Path, cases: dict[str, list[str]]) -> dict[str, dict]:
    """Train every case on a layout; the last rank of a pipeline is one that sees the loss."""
    ranks, parallelism = LAYOUTS[layout]
    config = write_config(folder, ["a"], [f'"{corpus}"'], parallelism)
    site = start_ranks(config, "a", ranks, "http://127.0.0.1:1", train_cases, config, folder, cases)
    assert site.wait() == [0] * ranks, site.log()[-3000:]
    return json.loads((folder / f"results_{ranks - 1}.json").read_text())


def train_cases(config: Path, folder: Path, cases: dict[str, list[str]]) -> None:
    """Some steps of each case at one rank, which leaves what it saw."""
    from titan_ext.trainer.trainer import Trainer

    results = {}
    for name, flags in cases.items():
        trainer = build(config, folder, flags)
        # A process has one mesh; the trainers that follow take the first's.
        Trainer.init_distributed = lambda self, dims=trainer.parallel_dims: dims
        results[name] = train(trainer)
    (folder / f"results_{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    os._exit(0)


def build(config: Path, folder: Path, flags: list[str]) -> Any:
    from titan_ext.config import load_site

    shards = load_site(config, "a").layout.batch
    fixed = [f"--dump_folder={folder}", "--semi_sync.method=none", "--model.name=abbie", "--model.vocab_size=264"]
    trainer = load_site(config, "a", [*fixed, f"--training.local_batch_size={ROWS // shards}", *flags]).config.build()
    for part in trainer.model_parts:
        for name, parameter in part.named_parameters():
            fill(name.replace("_checkpoint_wrapped_module.", ""), parameter.detach())
    return trainer


def fill(name: str, value: DTensor) -> None:
    """Values that depend on the parameter's name alone."""
    whole = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    whole = 1 + 0.1 * whole if value.ndim == 1 else whole / value.shape[1] ** 0.5
    copies = DTensor.from_local(whole, value.device_mesh, [Replicate()] * value.device_mesh.ndim, run_check=False)
    value.copy_(copies.redistribute(placements=value.placements))


def train(trainer: Any) -> dict[str, list]:
    """Loss, gradient norm and iterations of each step."""
    lines, iterations = [], []
    trainer.metrics_processor.log = lambda *values, **_: lines.append(values)
    for trainer.step in range(1, STEPS + 1):
        trainer.train_step(microbatches(trainer))
        iterations.append(trainer.model_parts[0].num_iterations)
    return {
        "losses": [loss for _, loss, _, _ in lines],
        "norms": [norm for _, _, _, norm in lines],
        "iterations": iterations,
    }


def microbatches(trainer: Any) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """This rank's rows of the step's batch, which is the same in every layout."""
    tokens = torch.randint(0, 256, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(trainer.step))
    if trainer.parallel_dims.dp_enabled:
        mesh = trainer.parallel_dims.get_mesh("batch")
        tokens = tokens.chunk(mesh.size())[mesh.get_local_rank()]
    for rows in tokens.chunk(trainer.num_pipeline_parallel_microbatches):
        positions = torch.arange(LENGTH).remainder(40).expand(len(rows), LENGTH).contiguous()
        yield {"input": rows[:, :-1].contiguous(), "positions": positions}, rows[:, 1:].contiguous()
