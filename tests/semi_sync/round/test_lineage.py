"""Runs that meet, checkpoints that are behind, states that differ: who goes on, and from where."""

import json

import pytest
import torch

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, run_sites
from tests.semi_sync.test_membership import advance, copy_tensors, one_weight
from titan_ext.errors import UserError
from titan_ext.semi_sync import CommitLog, SemiSync, SiteOptions, SiteRanks

SETTINGS = dict(method="diloco", sync_every=2, outer_momentum=0.5)


def site_of(index, own, tmp_path, *, name=None, records=None, allow_rollback=False, value=0.0):
    """A model and its outer loop, with a log of commits."""
    model = one_weight(value)
    outer = SemiSync.Config(**SETTINGS).build(
        model_parts=[model],
        optimizers=[],
        manager=own,
        site=SiteOptions(
            name=name or f"site{index}",
            ranks=SiteRanks(alone=True),
            commit_log=CommitLog(tmp_path / f"{index}" / "commits.jsonl"),
            allow_rollback=allow_rollback,
        ),
        on_round=records.append if records is not None else None,
    )
    return model, outer


def train(index, model, outer, until):
    while outer.inner_step < until:
        advance(model, 0.25 * (index + 1))
        outer.step(tokens=10 * (index + 1))


def log_of(index, tmp_path):
    return [json.loads(line) for line in (tmp_path / f"{index}" / "commits.jsonl").read_text().splitlines()]


def test_every_commit_is_logged_alike_at_all_sites(tmp_path):
    def body(index, own):
        records = []
        model, outer = site_of(index, own, tmp_path, records=records)
        outer.join()
        train(index, model, outer, 6)
        return [record.contributors for record in records]

    contributors = run_sites(3, body)
    assert contributors == [[["site0", "site1", "site2"]] * 3] * 3 or all(
        sorted(each) == ["site0", "site1", "site2"] for site in contributors for each in site
    )
    logs = [log_of(index, tmp_path) for index in range(3)]
    for lines in zip(*logs, strict=True):
        assert (
            len({(line["run"], line["generation"], line["round"], line["step"], line["digest"]) for line in lines}) == 1
        )
        assert all(
            sorted(line["contributors"]) == sorted(line["sites"]) == ["site0", "site1", "site2"] for line in lines
        )
        assert {line["tokens"] for line in lines} == {2 * (10 + 20 + 30)}
    assert [line["round"] for line in logs[0]] == [1, 2, 3]
    assert len({line["digest"] for line in logs[0]}) == 3


def test_two_sites_of_one_name_are_refused(tmp_path):
    def body(index, own):
        _, outer = site_of(index, own, tmp_path, name="east")
        with pytest.raises(UserError, match='named "east"'):
            outer.join()

    run_sites(2, body)


def saved_alone(index, tmp_path, steps):
    """The state of a site that trained by itself."""

    def body(_, own):
        model, outer = site_of(index, own, tmp_path)
        outer.join()
        train(index, model, outer, steps)
        return copy_tensors(outer.state_dict()), model.weight.detach().clone()

    return run_sites(1, body, min_sites=1)[0]


def resume(model, outer, state):
    outer.load_state_dict(state[0])
    model.weight.data.copy_(state[1])


def test_a_site_without_a_checkpoint_takes_from_anothers_what_that_one_would_have_given_it(tmp_path):
    """The global value, the outer momentum and the place in the run; not the work since the last commit, nor counts."""
    saved, own_value = saved_alone(0, tmp_path, 5)

    def body(index, own):
        model, outer = site_of(1, own, tmp_path, value=9.0)
        shared, names = outer.shared_checkpoint()
        assert names == [] and shared.keys() == {"counters", "states"}
        shared["counters"] = saved["counters"]
        for key, parameters in shared["states"].items():
            for name, values in parameters.items():
                for part, value in values.items():
                    value.copy_(saved["states"][key][name][part])
        outer.take_shared_checkpoint(shared)
        outer.join()
        state = copy_tensors(outer.state_dict())
        return model.weight.detach().clone(), outer.inner_step, outer.rounds, outer.ledger.rounds, state

    weight, step, rounds, counted, state = run_sites(1, body, min_sites=1)[0]
    kept = saved["states"]["params/0"]["weight"]
    assert torch.equal(weight, kept["global"]) and not torch.equal(weight, own_value)
    assert state["states"]["params/0"]["weight"].keys() == kept.keys() == {"global", "outer.momentum_buffer"}
    assert torch.equal(state["states"]["params/0"]["weight"]["outer.momentum_buffer"], kept["outer.momentum_buffer"])
    assert (step, rounds, counted) == (5, 2, 0)
    then, now = (json.loads(each["counters"]) for each in (saved, state))
    assert now["lineage"]["run"] == then["lineage"]["run"] and now["tokens"] == 0 != then["tokens"]


def test_states_of_two_runs_never_mix(tmp_path):
    """Neither is overwritten, and both sites say why they do not go on."""
    states = [saved_alone(index, tmp_path, 4 + 2 * index) for index in range(2)]

    def body(index, own):
        model, outer = site_of(index, own, tmp_path)
        resume(model, outer, states[index])
        with pytest.raises(UserError, match="two runs meet at one lighthouse"):
            outer.join()
        return torch.equal(model.weight, states[index][1])

    assert run_sites(2, body) == [True, True]


def test_a_stranger_costs_a_running_site_a_round_and_nothing_else(tmp_path):
    """A fresh site that trained alone joins a run: it leaves, the run goes on with its own state."""
    stranger = saved_alone(1, tmp_path, 40)  # more commits than the run has: torchft would heal the run from it
    stranger_may_come, stranger_left = Meeting(), Meeting()

    def before(index):
        if index == 1:
            stranger_may_come.wait()

    def body(index, own):
        if index == 1:
            model, outer = site_of(1, own, tmp_path)
            resume(model, outer, stranger)
            with pytest.raises(UserError, match="two runs meet"):
                outer.join()
            own.shutdown(wait=False)
            stranger_left.arrive()
            return None
        records = []
        model, outer = site_of(0, own, tmp_path, records=records)
        outer.join()
        train(0, model, outer, 3)
        stranger_may_come.arrive()
        wait_for_requests(own.lighthouse, 1)
        train(0, model, outer, 4)
        stranger_left.wait()
        train(0, model, outer, 8)
        return records, model.weight.tolist(), outer.rounds

    (records, weights, rounds), _ = run_sites(2, body, min_sites=1, before=before)
    refused = [record for record in records if not record.committed]
    assert refused and all("two runs meet" in record.error for record in refused)
    assert records[-1].committed and records[-1].contributors == ["site0"]
    assert not any(record.healed for record in records)
    assert len(log_of(0, tmp_path)) == rounds

    def undisturbed(_, own):
        model, outer = site_of(9, own, tmp_path)
        outer.join()
        train(0, model, outer, 8)
        return model.weight.tolist()

    # The refused round was tried again one inner step later, so only the momentum differs.
    assert weights[0] == pytest.approx(run_sites(1, undisturbed, min_sites=1)[0][0], rel=0.5)


def test_a_fresh_site_never_heals_a_run(tmp_path):
    """A site that lost everything starts alone, then the run returns: the run's state stays what it was."""
    run_state = saved_alone(0, tmp_path, 8)
    run_may_come, run_left = Meeting(), Meeting()

    def before(index):
        if index == 1:
            run_may_come.wait()

    def body(index, own):
        if index == 0:
            model, outer = site_of(5, own, tmp_path)
            outer.join()
            train(0, model, outer, 3)
            run_may_come.arrive()
            wait_for_requests(own.lighthouse, 1)
            train(0, model, outer, 4)
            run_left.wait()
            return None
        model, outer = site_of(0, own, tmp_path)
        resume(model, outer, run_state)
        with pytest.raises(UserError, match="two runs meet"):
            outer.join()
        own.shutdown(wait=False)
        run_left.arrive()
        return torch.equal(model.weight, run_state[1]), outer.rounds

    assert run_sites(2, body, min_sites=1, before=before)[1] == (True, 4)


def trained_together(tmp_path, save_at, until):
    """Two sites' states after ``save_at`` steps; their logs go on to ``until``."""

    def body(index, own):
        model, outer = site_of(index, own, tmp_path)
        outer.join()
        states = {}
        for upto in (save_at[index], until):
            train(index, model, outer, upto)
            states[upto] = copy_tensors(outer.state_dict()), model.weight.detach().clone()
        return states[save_at[index]]

    return run_sites(2, body)


def test_a_site_behind_its_log_waits_for_the_one_that_has_the_later_state(tmp_path):
    """Site 0 comes back with an old checkpoint, first and alone; it must not lead, and takes site 1's."""
    states = trained_together(tmp_path, save_at=(4, 8), until=8)
    waited = Meeting()

    def before(index):
        if index == 1:
            waited.wait()

    def body(index, own):
        model, outer = site_of(index, own, tmp_path)
        resume(model, outer, states[index])
        if index == 0:
            vote = own.should_commit

            def noted(*arguments):
                committed = vote(*arguments)
                assert not committed or waited.reached.is_set(), "it went on alone"
                waited.arrive()
                return committed

            own.should_commit = noted
        outer.join()
        return outer.inner_step, outer.rounds, outer.shared_state_sha256()

    first, second = run_sites(2, body, min_sites=1, before=before)
    assert first == second
    assert first[:2] == (8, 4)


def test_all_behind_go_on_in_a_new_generation(tmp_path):
    """Everybody's checkpoint is older than the log: the run is rolled back, once, and says so in its log."""
    states = trained_together(tmp_path, save_at=(4, 6), until=8)

    def body(index, own):
        model, outer = site_of(index, own, tmp_path)
        resume(model, outer, states[index])
        outer.join()
        joined_at = outer.inner_step
        train(index, model, outer, 10)
        return joined_at, own.current_step(), outer.shared_state_sha256()

    first, second = run_sites(2, body)
    assert first == second
    assert first[0] == 6 and first[1] >= 2**32
    for index in range(2):
        lines = log_of(index, tmp_path)
        assert [(line["generation"], line["round"]) for line in lines] == [
            (0, 1),
            (0, 2),
            (0, 3),
            (0, 4),
            (1, 4),
            (1, 5),
        ]
        assert len({line["run"] for line in lines}) == 1


def test_a_generation_left_behind_heals_nobody(tmp_path):
    """Site 0 rolls back by order; then site 1 returns with more rounds of the old generation, and takes site 0's state."""
    states = trained_together(tmp_path, save_at=(4, 8), until=8)
    other_may_come = Meeting()

    def before(index):
        if index == 1:
            other_may_come.wait()

    def body(index, own):
        model, outer = site_of(index, own, tmp_path, allow_rollback=index == 0)
        resume(model, outer, states[index])
        outer.join()
        joined_at = outer.inner_step
        if index == 0:
            train(index, model, outer, 5)
            other_may_come.arrive()
            wait_for_requests(own.lighthouse, 1)
        train(index, model, outer, 10)
        return joined_at, outer.shared_state_sha256()

    first, second = run_sites(2, body, min_sites=1, before=before)
    assert first[0] == 4 and second[0] == 6
    assert first[1] == second[1]
    assert log_of(1, tmp_path)[-1]["generation"] == 1


def test_a_site_whose_shared_state_went_astray_is_found_and_mended(tmp_path):
    """A flipped bit in one site's global copy: named in the next round, healed by the one after."""

    def body(index, own):
        records = []
        model, outer = site_of(index, own, tmp_path, records=records)
        outer.join()
        train(index, model, outer, 4)
        if index == 2:
            outer.global_parameters()["weight"][1] += 1e-3
            outer._committer.checksum.forget()
            outer._exchange.lineage.checksum = outer._committer.checksum.after(())
        train(index, model, outer, 10)
        return outer.shared_state_sha256(), [(r.step, r.committed, r.error, r.healed) for r in records]

    results = run_sites(3, body)
    assert len({digest for digest, _ in results}) == 1
    for index, (_, rounds) in enumerate(results):
        astray = [each for each in rounds if not each[1]]
        assert len(astray) == 1 and "the shared state of site2 is not that of the others" in astray[0][2]
        assert any(healed for *_, healed in rounds) is (index == 2)


def test_a_log_that_a_crash_cut_short_is_read_up_to_there(tmp_path):
    saved_alone(0, tmp_path, 6)
    path = tmp_path / "0" / "commits.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    run = json.loads(lines[0])["run"]
    log = CommitLog(path)
    assert log.last(run).round == 2
    log.append(log.last(run))
    assert log.last(run).round == 2 and len(path.read_bytes().splitlines()) == 4
    assert log.last("0" * 16) is None


def test_a_disk_that_takes_no_more_is_reported_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "0").write_text("a file where the folder should be")

    def body(index, own):
        model, outer = site_of(index, own, tmp_path)
        outer.join()
        train(index, model, outer, 4)
        return outer.rounds

    assert run_sites(1, body, min_sites=1) == [2]
    assert "round 1 is not in" in caplog.text
