"""The parallelism and the replica groups of a configuration of torchtitan 0.1 or 0.2."""

from itertools import pairwise

from titan_ext.config.migration.draft import Draft
from titan_ext.config.migration.old_format import SCHEDULES, names_in, renamed
from titan_ext.config.migration.old_models import EARLY
from titan_ext.config.toml_text import toml_value


def migrate_parallelism(draft: Draft) -> None:
    """Degrees and pipelines as they were written before."""
    degree = draft.old.get("parallelism.pipeline_parallel_degree") or draft.old.get(
        "experimental.pipeline_parallel_degree", 1
    )
    _data_parallel(draft)
    points = draft.take("parallelism.pipeline_parallel_split_points", "experimental.pipeline_parallel_split_points")
    if points and degree > 1:
        _split(draft, names_in(points))
    count = draft.take("parallelism.pipeline_parallel_microbatches", "experimental.pipeline_parallel_microbatches")
    if degree > 1 and (count or draft.done.era == EARLY):
        _microbatches(draft, count or degree)
    for key in ("parallelism.pipeline_parallel_schedule", "experimental.pipeline_parallel_schedule"):
        if key in draft.old:
            draft.old[key] = SCHEDULES.get(draft.old[key], draft.old[key])


def _data_parallel(draft: Draft) -> None:
    kind = draft.take("training.data_parallel_type", default="fsdp")
    degree = draft.take("training.data_parallel_degree")
    if degree is None:
        return
    axis = "replicate" if kind == "ddp" else "shard"
    if axis == "replicate" and degree == -1:
        draft.blank("parallelism.data_parallel_replicate_degree", "it was -1, all ranks that are left; their number", 0)
        draft.new["parallelism.data_parallel_shard_degree"] = 1
        return
    other = "shard" if axis == "replicate" else "replicate"
    draft.new |= {f"parallelism.data_parallel_{axis}_degree": degree, f"parallelism.data_parallel_{other}_degree": 1}


def _split(draft: Draft, points: list[str]) -> None:
    """Where the model was cut, as the modules of each stage."""
    if draft.layers is None or not all(point.startswith("layers.") for point in points):
        draft.done.changed.append(
            f"pipeline_parallel_split_points = {toml_value(points)}: the layers are dealt evenly here; "
            "parallelism.module_fqns_per_model_part names the modules of each stage"
        )
        return
    edges = [0, *sorted(int(point.removeprefix("layers.")) for point in points), draft.layers]
    stages = [[f"layers.{layer}" for layer in range(*edge)] for edge in pairwise(edges)]
    stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", "lm_head"]
    draft.new["parallelism.module_fqns_per_model_part"] = stages


def _microbatches(draft: Draft, count: int) -> None:
    batch = draft.old.get("training.local_batch_size", draft.old.get("training.batch_size", 8))
    if batch % count:
        why = f"the batch of {batch} was cut into {count} microbatches, which it is no multiple of"
        draft.blank("parallelism.pipeline_parallel_microbatch_size", why, 0)
    else:
        draft.new["parallelism.pipeline_parallel_microbatch_size"] = batch // count


def migrate_sites(draft: Draft) -> None:
    """The replica groups of torchft as sites, and the outer loop between them."""
    draft.done.sites = [{"name": "site0"}]
    if not draft.take("fault_tolerance.enable", default=False):
        for key in [key for key in draft.old if key.startswith(("fault_tolerance.", "optimizer.desloc."))]:
            draft.done.harmless.append(key)
            del draft.old[key]
        return
    method = draft.take("fault_tolerance.semi_sync_method")
    _outer_loop(draft, None if method is None else str(method).lower())
    count, index = draft.take("fault_tolerance.group_size", default=0), draft.take("fault_tolerance.replica_id")
    if count > 0:
        draft.done.sites = [{"name": f"site{place}"} for place in range(count)]
    else:
        draft.done.sites = [{"name": "site0", "count": 0}]
        draft.done.blanks["count"] = "the replica groups of the run, or a [[site]] table for each instead"
    if index is not None:
        draft.done.changed.append(f"fault_tolerance.replica_id = {index}: this one is started with --site site{index}")
    timeout = draft.take("fault_tolerance.process_group_timeout_ms")
    if timeout is not None:
        draft.new["replica.timeout_seconds"] = timeout / 1000
    draft.new["replica.min_sites"] = draft.take("fault_tolerance.min_replica_size", default=1)
    if draft.take("fault_tolerance.rank0_synchronization_only"):
        draft.new["semi_sync.pairing"] = "leader"


def _outer_loop(draft: Draft, method: str | None) -> None:
    if method is None:
        why = "torchft averaged gradients over the replica groups at every step, which no method here does"
        draft.blank("semi_sync.method", why)
        return
    draft.new["semi_sync.sync_every"] = draft.take(
        "optimizer.desloc.param_sync_every", "fault_tolerance.sync_steps", default=5
    )
    if method == "desloc":
        method = _des_loc(draft)
    draft.new["semi_sync.method"] = method
    if method == "diloco":
        draft.new |= {
            "semi_sync.outer_optimizer": "sgd",
            "semi_sync.outer_lr": 0.7,
            "semi_sync.outer_momentum": 0.9,
            "semi_sync.nesterov": True,
        }
    fragments = draft.take("fault_tolerance.module_fqns_per_model_fragment")
    if fragments:
        draft.new["semi_sync.fragments"] = renamed(fragments)


def _des_loc(draft: Draft) -> str:
    """DES-LOC's periods and outer optimizer; with a quasi-hyperbolic inner optimizer it is MT-DAO."""
    method = "mt_dao" if str(draft.new["optimizer.name"]).startswith("QH") else "des_loc"
    draft.take("optimizer.desloc.enabled")
    periods = draft.take("optimizer.desloc.optimizer_sync_every")
    if not periods:
        draft.done.changed.append(
            "optimizer.desloc.optimizer_sync_every is not set: the periods of the moments are ours"
        )
    elif method == "mt_dao":
        draft.new["semi_sync.mt_dao.momentum_sync_every"] = periods[:-1]
        draft.new["semi_sync.mt_dao.second_moment_sync_every"] = periods[-1]
    else:
        draft.new["semi_sync.des_loc.first_moment_sync_every"] = periods[0]
        draft.new["semi_sync.des_loc.second_moment_sync_every"] = periods[-1]
    target = draft.take("optimizer.desloc.outer_optimizer.target")
    if target is not None:
        draft.new["semi_sync.outer_optimizer"] = str(target).lower()
    if draft.take("optimizer.desloc.backup_device") == "cpu":
        draft.new["semi_sync.outer_state_device"] = "cpu"
    return method
