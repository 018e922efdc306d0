"""A schedule stretched for small batches is the recipe's, seen more often."""

import torch

from titan_ext.trainer.lr_scheduler import LRSchedulersContainer


def rates(steps, training_steps, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LRSchedulersContainer.Config(**settings).build(optimizers=[optimizer], training_steps=training_steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_and_length_are_multiplied():
    """Photon: T = T_c B_c / B_l and W = W_c B_c / B_l at the same peak."""
    recipe = rates(40, 40, warmup_steps=8, total_steps=40, decay_type="cosine", min_lr_factor=0.1)
    longer = rates(160, 160, warmup_steps=8, total_steps=40, decay_type="cosine", min_lr_factor=0.1, stretch=4.0)
    assert max(longer) == max(recipe) == 1.0
    assert longer[31] == 1.0 and longer[30] < 1.0 and longer[15] == recipe[3]
    for step in range(8, 39):
        assert recipe[step + 1] <= longer[4 * step + 3] <= recipe[step], "between two steps of the recipe"


def test_without_total_steps_the_schedule_is_for_the_runs_steps():
    assert rates(20, 20, warmup_steps=2, stretch=2.0) == rates(20, 20, warmup_steps=4)
