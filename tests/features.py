"""Which features of torchtitan work under the outer loop: the cells that tests train or see refused, and their table.

``python -m tests.features`` writes the table into ``titan_ext/trainer/README.md``; a test compares.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.end_to_end.forked import SiteRun

STEPS = 6
DOCUMENT = Path(__file__).parents[1] / "titan_ext" / "trainer" / "README.md"
_BEGIN, _END = "<!-- written by python -m tests.features -->\n", "<!-- end -->\n"
_SAVING = ("--checkpoint.enable", "--checkpoint.interval=2")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A feature with which two sites train under DiLoCo."""

    feature: str
    flags: tuple[str, ...]
    ranks: int = 1
    """Of each site."""
    text: str = ""
    """What its configuration file has besides."""
    shows: Callable[[SiteRun], bool] = field(default=lambda site: True)
    """Whether a site that has trained shows the feature."""
    first: tuple[str, ...] = ()
    """Flags of a run before, which this one goes on from."""
    slow: bool = False
    run: str = ""
    """Features of one run are trained together; empty for one that is trained alone."""

    @property
    def stem(self) -> str:
        """Of its configuration file."""
        return "".join(each if each.isalnum() else "_" for each in self.run or self.feature)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A feature that is refused at the start in one line."""

    feature: str
    flags: tuple[str, ...]
    said: str
    without_gpu: bool = False
    """Whether that is so on a machine without a GPU alone."""


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A feature with tests of its own."""

    feature: str
    how: str
    test: str
    outcome: str = "works"


def _saved(site: SiteRun) -> list[str]:
    return sorted(each.name for each in (site.folder / site.name / "checkpoint").glob("step-*"))


def _pipelined(schedule: str, *flags: str) -> Trained:
    given = (
        "--parallelism.pipeline_parallel_degree=2",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        "--parallelism.pipeline_parallel_microbatch_size=1",
        "--activation_checkpoint.mode=none",
        *flags,
    )
    slow = schedule not in ("Interleaved1F1B", "ZBVZeroBubble")
    return Trained(feature=f"pipeline schedule {schedule}", flags=given, ranks=2, slow=slow)


TRAINED = (
    Trained(
        feature="gradient accumulation",
        flags=("--training.global_batch_size=8",),
        run="accumulating",
        shows=lambda site: site.summary()["tokens"] == STEPS * 8 * 64,
    ),
    Trained(feature="activation checkpointing, full", flags=("--activation_checkpoint.mode=full",), run="accumulating"),
    Trained(
        feature="activation checkpointing, selective", flags=("--activation_checkpoint.mode=selective",), run="bfloat16"
    ),
    Trained(
        feature="activation checkpointing, memory budget",
        flags=("--activation_checkpoint.mode=memory_budget", "--compile.enable"),
        slow=True,
    ),
    Trained(feature="torch.compile", flags=("--compile.enable",), slow=True),
    Trained(feature="bf16 parameters, fp32 global copy", flags=("--training.dtype=bfloat16",), run="bfloat16"),
    Trained(
        feature="asynchronous checkpoints",
        flags=(*_SAVING, "--checkpoint.async_mode=async"),
        run="deterministic",
        shows=lambda site: _saved(site) == ["step-2", "step-4", "step-6"],
    ),
    Trained(
        feature="keep_latest_k",
        flags=(*_SAVING, "--checkpoint.keep_latest_k=2"),
        run="bfloat16",
        shows=lambda site: _saved(site)[-2:] == ["step-4", "step-6"],
    ),
    Trained(
        feature="load_step",
        first=_SAVING,
        flags=(*_SAVING, "--checkpoint.load_step=2", "--replica.allow_rollback=true"),
        shows=lambda site: [line["step"] for line in site.lines("step")] == [*range(1, 7), *range(3, 7)],
    ),
    *(
        Trained(feature=f"optimizer, {each}", flags=(f"--optimizer.implementation={each}",), run=run)
        for each, run in (("fused", "accumulating"), ("foreach", "bfloat16"), ("for-loop", "deterministic"))
    ),
    Trained(
        feature="parameter groups",
        flags=(),
        run="deterministic",
        text="""[[optimizer.param_groups]]
pattern = "norm"
optimizer_name = "AdamW"
optimizer_kwargs = {lr = 1e-3, weight_decay = 0.0}
[[optimizer.param_groups]]
pattern = ".*"
optimizer_name = "AdamW"
optimizer_kwargs = {lr = 1e-2}
""",
    ),
    Trained(
        feature="validator",
        flags=(
            "--validator.enable",
            "--validator.freq=2",
            "--validator.steps=1",
            '--validator.dataloader={dataset="builtin:docs"}',
        ),
        shows=lambda site: [line["step"] for line in site.lines("validation")][-1] == STEPS,
        run="accumulating",
    ),
    Trained(
        feature="profiler",
        flags=("--profiler.enable_profiling", "--profiler.profile_freq=4"),
        shows=lambda site: any((site.folder / site.name).rglob("*trace*.json*")),
        run="accumulating",
    ),
    Trained(feature="seeds, deterministic", flags=("--debug.seed=7", "--debug.deterministic"), run="deterministic"),
    Trained(
        feature="converter, LoRA",
        flags=(),
        text='[[model.converters]]\nname = "lora"\nrank = 4\nalpha = 8.0\ntarget_modules = ["wo"]\n',
    ),
    Trained(
        feature="HSDP",
        flags=("--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"),
        ranks=2,
    ),
    *(_pipelined(each) for each in ("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")),
    *(_pipelined(each) for each in ("ZBVZeroBubble", "DualPipeV")),
)
REFUSED = (
    Refused(
        feature="context parallel",
        flags=("--parallelism.context_parallel_degree=2",),
        said="parallelism.context_parallel_degree = 2: needs a GPU",
        without_gpu=True,
    ),
    Refused(
        feature="CPU off-load",
        flags=("--training.enable_cpu_offload=true",),
        said="training.enable_cpu_offload = true: needs a GPU",
        without_gpu=True,
    ),
    Refused(
        feature="asynchronous checkpoints with pinned memory",
        flags=(*_SAVING, "--checkpoint.async_mode=async_with_pinned_mem"),
        said='checkpoint.async_mode = "async_with_pinned_mem": needs a GPU',
        without_gpu=True,
    ),
    Refused(
        feature="memory snapshots",
        flags=("--profiler.enable_memory_snapshot=true",),
        said="profiler.enable_memory_snapshot = true: needs a GPU",
        without_gpu=True,
    ),
    Refused(
        feature="optimizer, bf16 states",
        flags=("--optimizer.implementation=fused_opt_states_bf16",),
        said='optimizer.implementation = "fused_opt_states_bf16": needs a GPU',
        without_gpu=True,
    ),
    Refused(feature="dry runs", flags=("--comm.mode=fake_backend",), said='comm.mode = "fake_backend": must be'),
)
ELSEWHERE = (
    Elsewhere(
        feature="FSDP, tensor, pipeline parallelism and their mixes",
        how="`[parallelism]`",
        test="tests/end_to_end/test_methods_on_layouts.py",
    ),
    Elsewhere(
        feature="expert parallelism",
        how="`parallelism.expert_parallel_degree`",
        test="tests/end_to_end/test_upstream_models.py",
    ),
    Elsewhere(
        feature="checkpoints on an object store",
        how="`checkpoint.folder=s3://BUCKET/RUN`",
        test="tests/end_to_end/test_object_store.py",
    ),
    Elsewhere(feature="initial load", how="`checkpoint.initial_load_path`", test="tests/end_to_end/test_continue.py"),
    Elsewhere(feature="W&B", how="`metrics.enable_wandb`", test="tests/trainer/test_wandb.py"),
    Elsewhere(
        feature="float8, mxfp8, nvfp4",
        how="`[[model.converters]]`",
        test="tests/config/test_converters.py",
        outcome="built from TOML; trained in no test (needs a GPU)",
    ),
)


def table() -> str:
    """The table, as it stands in the document."""
    return "".join(f"{line}\n" for line in _lines())


def _lines() -> Iterator[str]:
    yield from ("| feature | set by | under the outer loop | test |", "| --- | --- | --- | --- |")
    features = "tests/end_to_end/test_features.py"
    rows = [(each.feature, each.how, each.outcome, each.test) for each in ELSEWHERE]
    for trained in TRAINED:
        set_by = _set_by(trained.flags) or f"`{trained.text.splitlines()[0]}`"
        rows.append((trained.feature, set_by, "works" + (" (slow test)" if trained.slow else ""), features))
    for refused in REFUSED:
        outcome = "refused without a GPU; not tested on one" if refused.without_gpu else "refused"
        rows.append((refused.feature, _set_by(refused.flags), outcome, features))
    yield from (f"| {' | '.join(row)} |" for row in sorted(rows, key=lambda row: row[0].lower()))


def _set_by(flags: tuple[str, ...]) -> str:
    """The first key that is not of the checkpoints' being on, with its value."""
    own = [flag.removeprefix("--") for flag in flags if flag not in _SAVING]
    first = next((each for each in own if "_schedule" in each), own[0] if own else "")
    return f"`{first}`" if first else ""


def document(text: str) -> str:
    """The document's text with the table of now."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{table()}{_END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
