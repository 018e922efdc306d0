"""What a real site writes to its metrics, wherever its pipeline has the loss."""

import pytest

from tests.end_to_end.forked import start_site
from tests.end_to_end.test_layouts import write_config
from tests.end_to_end.test_runs import own_data

V_SHAPED = ("DualPipeV", "ZBVZeroBubble")  # torch cannot evaluate with these
SCHEDULES = [*V_SHAPED, "1F1B"]


@pytest.mark.parametrize(
    "schedule", [pytest.param(each, marks=pytest.mark.slow if each != "DualPipeV" else []) for each in SCHEDULES]
)
def test_the_loss_of_training_and_of_validation_is_that_of_the_last_stage(schedule, tmp_path, text_corpus):
    validation = f"""
[validator]
enable = {"false" if schedule in V_SHAPED else "true"}
steps = 2
freq = 2
dataloader = {{ dataset = "{text_corpus}" }}
"""
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {"pipeline_parallel_degree": 2}, validation)
    flags = [
        "--training.steps=2",
        "--semi_sync.method=none",
        "--model.n_layers=4",
        "--activation_checkpoint.mode=none",
        "--parallelism.pipeline_parallel_microbatch_size=1",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
    ]
    site = start_site(config, "a", 2, "http://127.0.0.1:1", *flags)
    assert site.wait() == [0, 0], site.log()[-3000:]
    assert len(site.losses()) == 2 and all(5 < loss < 7 for loss in site.losses())
    assert site.summary()["final_loss"] == site.losses()[-1]
    assert [line["step"] for line in site.lines("validation")] == ([] if schedule in V_SHAPED else [1, 2])
    assert all(5 < line["loss"] < 7 for line in site.lines("validation"))
