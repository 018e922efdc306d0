"""Scopes that only the sites of one label share, such as the embeddings of one language."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, run_sites
from tests.semi_sync.test_membership import copy_tensors
from tests.semi_sync.wire.test_bytes import Counter
from titan_ext.optim import QHAdamW
from titan_ext.semi_sync import CommitLog, ScopeConfig, SemiSync, SemiSyncConfig, SiteOptions, SiteRanks
from titan_ext.semi_sync.round.agreement import Position, SiteStatus, agree
from titan_ext.semi_sync.round.contributions import Contributions
from titan_ext.semi_sync.testing import InProcessSites

LANGUAGES = ["de", "en", "de", "en", "de", "fr"]
WEIGHTS = [1.0, 3.0, 2.0, 1.0, 4.0, 2.0]
BY_LANGUAGE = ScopeConfig(name="embeddings", parameters=["embeddings.*"], shared="group", group="language")
ROWS, WIDTH = 7, 5


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embeddings = nn.Embedding(ROWS, WIDTH, _weight=torch.randn(ROWS, WIDTH, generator=generator))
        self.body = nn.Linear(WIDTH, 2, bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.randn(2, WIDTH, generator=generator))


def local_step(model, index, step):
    generator = torch.Generator().manual_seed(100 * index + step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def options_of(languages, weights=None):
    weights = weights or [1.0] * len(languages)
    return [
        {"name": f"site{index}", "labels": {"language": language}, "weight": weight}
        for index, (language, weight) in enumerate(zip(languages, weights, strict=True))
    ]


class Reference:
    """One group's values in float64: DiLoCo's Nesterov step on the weighted mean, or that mean."""

    def __init__(self, start, method):
        self.values, self.momentum, self.method = start.double().clone(), torch.zeros(start.shape).double(), method

    def round(self, values, weights):
        gradient = torch.zeros_like(self.values)
        for value, weight in zip(values, weights, strict=True):
            gradient += weight * (self.values - value) / sum(weights)
        if self.method == "local_sgd":
            self.values = self.values - gradient
        else:
            self.momentum = 0.9 * self.momentum + gradient
            self.values = self.values - 0.7 * (gradient + 0.9 * self.momentum)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (dict(method="local_sgd"), 1e-6),
        (dict(method="diloco"), 1e-5),
        (dict(method="diloco", codec="bf16"), 0.03),
        (dict(method="diloco", codec="int8"), 0.03),
        (dict(method="local_sgd", codec="topk", settings={"topk": {"density": 1.0}}), 1e-5),
    ],
)
def test_group_means_equal_the_equations(settings, tolerance):
    sites = InProcessSites(len(LANGUAGES))
    models = [Model() for _ in LANGUAGES]
    start = Model()
    config = SemiSyncConfig(sync_every=2, weighting="site", scopes=[BY_LANGUAGE], bucket_mib=3e-5, **settings)
    outer = sites.outer_loops(config, models, options=options_of(LANGUAGES, WEIGHTS))
    groups = {each: [i for i, own in enumerate(LANGUAGES) if own == each] for each in set(LANGUAGES)}
    references = {each: Reference(start.embeddings.weight.detach(), settings["method"]) for each in groups}
    body = Reference(start.body.weight.detach(), settings["method"])
    for step in range(6):
        for index, model in enumerate(models):
            local_step(model, index, step)
        before = [(model.embeddings.weight.detach().double(), model.body.weight.detach().double()) for model in models]
        before = [(embeddings.clone(), weight.clone()) for embeddings, weight in before]
        sites.at_once(lambda site: outer[site].step())
        if step % 2 == 0:
            continue
        body.round([each[1] for each in before], WEIGHTS)
        for language, members in groups.items():
            references[language].round([before[i][0] for i in members], [WEIGHTS[i] for i in members])
            for index in members:
                assert torch.equal(models[index].embeddings.weight, models[members[0]].embeddings.weight)
                error = models[index].embeddings.weight - references[language].values
                assert error.abs().max() <= tolerance
                assert (models[index].body.weight - body.values).abs().max() <= tolerance
    assert not torch.equal(models[0].embeddings.weight, models[1].embeddings.weight)
    assert len({each.shared_state_sha256() for each in outer}) == 1
    sites.close()


@pytest.mark.parametrize("aggregation", ["mean", "median"])
def test_only_the_bytes_of_the_group_travel(aggregation):
    sites = InProcessSites(5)
    counters, config = {}, SemiSyncConfig(
        method="local_sgd", sync_every=1, scopes=[BY_LANGUAGE], aggregation=aggregation
    )  # fmt: skip
    managers = sites.managers()
    for index, manager in enumerate(managers):
        counters[index] = manager._process_group = _ByPeer(manager._process_group)
    sites.managers = lambda: managers
    models = [Model() for _ in range(5)]
    outer = sites.outer_loops(config, models, options=options_of(["de", "en", "de", "en", "fr"]))
    for index, model in enumerate(models):
        local_step(model, index, 0)
        # All began at once: the first of each group gave the others its values.
        assert counters[index].sent == (4 * ROWS * WIDTH if index < 2 else 0)
        counters[index].sent, counters[index].by_peer = 0, {}
        outer[index]._exchange.take_bytes()
    sites.at_once(lambda site: outer[site].step())
    body, embeddings = 4 * 2 * WIDTH, 4 * ROWS * WIDTH
    for index in range(5):
        others, peers = 4, 1 if index < 4 else 0
        # A mean takes a shard to each owner and the sum back; what every site has to see goes whole to every other.
        share = 2 * body * others / 5 if aggregation == "mean" else body * others
        assert counters[index].sent == share + peers * embeddings
        assert outer[index].ledger.last.bytes_sent == counters[index].sent
    assert counters[0].by_peer[1] == counters[0].by_peer[3] == counters[0].by_peer[4]
    assert counters[0].by_peer[2] == counters[0].by_peer[1] + embeddings
    sites.close()


class _ByPeer(Counter):
    def __init__(self, group):
        super().__init__(group)
        self.by_peer = {}

    def send(self, tensors, dst_rank, tag):
        self.by_peer[dst_rank] = self.by_peer.get(dst_rank, 0) + tensors[0].nbytes
        return super().send(tensors, dst_rank, tag)


@pytest.mark.parametrize(
    ("method", "optimizer_of", "state", "share"),
    [
        ("local_adam", partial(torch.optim.AdamW, lr=0.01), "exp_avg", 0.1),
        ("mt_dao", partial(QHAdamW, lr=0.01, betas=(0.75, 0.99), omegas=(0.9,)), "exp_avg_0", 0.25),
    ],
)
def test_moments_follow_their_parameters(method, optimizer_of, state, share):
    """After one step with gradient g a moment is ``share * g``, so its mean is that of the gradients of the group."""
    languages, weights = ["de", "en", "de", "en"], [1.0, 1.0, 3.0, 2.0]
    sites = InProcessSites(4)
    models = [Model() for _ in languages]
    optimizers = [optimizer_of(model.parameters()) for model in models]
    config = SemiSyncConfig(method=method, sync_every=1, weighting="site", scopes=[BY_LANGUAGE])
    outer = sites.outer_loops(config, models, optimizers, options_of(languages, weights))
    for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(index + 1))
        optimizer.step()
    sites.at_once(lambda site: outer[site].step())
    own = {"de": (1 + 3 * 3) / 4, "en": (2 + 2 * 4) / 3}
    everyone = (1 + 2 + 3 * 3 + 2 * 4) / 7
    for index, language in enumerate(languages):
        states = optimizers[index].state
        embeddings, body = (states[each][state] for each in models[index].parameters())
        assert torch.allclose(embeddings, torch.full_like(embeddings, share * own[language]), rtol=1e-6)
        assert torch.allclose(body, torch.full_like(body, share * everyone), rtol=1e-6)
    sites.close()


# -- real managers: sites that come late, go astray, stop ---------------------------------------------


def outer_of(model, own, index, language, *, optimizer=(), log=None, **settings):
    records = settings.pop("on_round", None)
    site = SiteOptions(name=f"site{index}", ranks=SiteRanks(alone=True), labels={"language": language}, commit_log=log)
    return SemiSync.Config(sync_every=2, scopes=[BY_LANGUAGE], **settings).build(
        model_parts=[model], optimizers=list(optimizer), manager=own, site=site, on_round=records
    )


def group_state(outer):
    state = next(each for each in outer._states if each.rule.group)
    return {
        name: {key: torch.as_tensor(value).clone() for key, value in values.items()}
        for name, values in state.private_state().items()
    }


def assert_same(first, second):
    for name, values in first.items():
        for key, value in values.items():
            assert torch.equal(value, second[name][key]), key


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="diloco"),
        dict(method="diloco", outer_optimizer="adam", outer_reading="torch"),
        dict(method="diloco", fragment_sync_delay=1),
    ],
    ids=["nesterov", "adam", "overlapped"],
)
def test_a_newcomer_takes_the_groups_state_from_its_own_group(settings, tmp_path):
    languages = ["de", "en", "en"]
    newcomer_may_come = Meeting()

    def before(index):
        if index == 2:
            newcomer_may_come.wait()

    def body(index, own):
        model = Model(seed=index)
        log = CommitLog(tmp_path / f"{index}.jsonl")
        outer = outer_of(model, own, index, languages[index], log=log, **settings)
        outer.join()
        joined_at = outer.inner_step
        while outer.inner_step < 8:
            if index == 0 and outer.inner_step == 4:
                newcomer_may_come.arrive()
            if index < 2 and outer.inner_step == 4:
                wait_for_requests(own.lighthouse, 1)
            local_step(model, index, outer.inner_step)
            outer.step()
        outer.finish()
        return joined_at, group_state(outer), outer.shared_state_sha256()

    results = run_sites(3, body, min_sites=2, before=before)
    assert results[2][0] > 4
    assert_same(results[1][1], results[2][1])
    assert not torch.equal(results[0][1]["embeddings.weight"]["global"], results[1][1]["embeddings.weight"]["global"])
    assert len({digest for *_, digest in results}) == 1
    last = [json.loads((tmp_path / f"{index}.jsonl").read_text().splitlines()[-1]) for index in range(3)]
    assert last[0]["digest"] == last[1]["digest"] == last[2]["digest"]
    digests = [line["group_digests"]["language"] for line in last]
    assert digests[1] == digests[2] != digests[0]


def test_sites_that_begin_together_take_the_first_of_their_group():
    def body(index, own):
        model = Model(seed=index)
        outer_of(model, own, index, "de" if index else "en", method="diloco").join()
        return model.embeddings.weight.detach().clone()

    results = run_sites(3, body)
    assert torch.equal(results[1], results[2])
    assert any(torch.equal(results[1], Model(seed=index).embeddings.weight) for index in (1, 2))
    assert torch.equal(results[0], Model(seed=0).embeddings.weight)


def test_a_group_state_that_went_astray_is_found_and_mended():
    def body(index, own):
        records, model = [], Model()
        outer = outer_of(model, own, index, "en" if index == 0 else "de", method="diloco", on_round=records.append)
        outer.join()
        for step in range(10):
            local_step(model, index, step)
            outer.step()
            if index == 3 and step == 3:
                committer = outer._committer
                next(each for each in outer._states if each.rule.group).global_parts[0][1] += 1e-3
                committer.checksum.forget()
                committer.exchange.lineage.group_checksums = (committer.checksum.after((), "language"),)
        return group_state(outer), [(each.committed, each.error, each.healed) for each in records]

    results = run_sites(4, body)
    assert_same(results[1][0], results[2][0])
    assert_same(results[1][0], results[3][0])
    for index, (_, rounds) in enumerate(results):
        astray = [error for committed, error, _ in rounds if not committed]
        assert len(astray) == 1 and "the shared state of site3 is not that of the others" in astray[0]
        assert any(healed for *_, healed in rounds) is (index == 3)


@pytest.mark.parametrize("delay", [0, 1])
def test_stop_and_resume_equals_never_stopped(delay):
    def start(index, own):
        model = Model()
        return model, outer_of(
            model, own, index, "de" if index else "en", method="diloco", codec="int8", fragment_sync_delay=delay
        )

    def steps(model, outer, index, until):
        while outer.inner_step < until:
            local_step(model, index, outer.inner_step)
            outer.step()

    def end(model, outer):
        outer.finish()
        return [parameter.detach().clone() for parameter in model.parameters()], group_state(outer)

    def straight(index, own):
        model, outer = start(index, own)
        outer.join()
        steps(model, outer, index, 9)
        return end(model, outer)

    def interrupted(index, own):
        model, outer = start(index, own)
        outer.join()
        steps(model, outer, index, 4)
        return copy_tensors(outer.state_dict()), copy_tensors(model.state_dict())

    def resumed(index, own):
        model, outer = start(index, own)
        outer.load_state_dict(saved[index][0])
        model.load_state_dict(saved[index][1])
        outer.join()
        steps(model, outer, index, 9)
        return end(model, outer)

    want, saved = run_sites(3, straight), run_sites(3, interrupted)
    for (parameters, state), (again, state_again) in zip(want, run_sites(3, resumed), strict=True):
        assert all(map(torch.equal, parameters, again))
        assert_same(state, state_again)


# -- pure parts ---------------------------------------------------------------------------------------


def test_an_outlier_is_one_among_the_sites_of_its_group():
    """Norms of another group, here a hundred times as large, say nothing."""
    labels = {"language": [1, 1, 1, 2, 2, 2]}
    norms = [[1.0], [1.0], [30.0], [100.0], [100.0], [100.0]]
    found = Contributions([1.0] * 6, norms, rank=0, labels=labels)
    assert found.outliers(10.0, ["language"]) == {2: [pytest.approx(1 / 3)]}
    assert found.within("language").weights == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("checksums", "diverged"), [([5, 5, 6, 7, 7], [2]), ([5, 5, 5, 7, 8], [4]), ([5, 5, 0, 7, 7], []), ([5, 5, 5, 7, 7], [])]
)  # fmt: skip
def test_checksums_are_compared_within_groups(checksums, diverged):
    table = [
        SiteStatus(
            name=str(index), fingerprint=1, run=1, position=Position(0, 3), step=4, rules=[0],
            labels=(1 if index < 3 else 2,), group_checksums=(checksum,),
        )
        for index, checksum in enumerate(checksums)
    ]  # fmt: skip
    assert [rank for rank in range(5) if agree(table, rank).diverged] == diverged


@pytest.mark.parametrize(
    ("scope", "labels", "words"),
    [
        (dict(shared="group"), {}, r"scopes\[0\]\.group"),
        (dict(shared="full", group="language"), {}, r"scopes\[0\]\.group = 'language'"),
        (dict(shared="group", group="language"), {"region": "eu"}, 'has no label "language"'),
    ],
)
def test_what_cannot_be_is_refused_by_name(scope, labels, words):
    with pytest.raises(ValueError, match=words):
        SemiSync.Config(method="diloco", scopes=[ScopeConfig(name="a", parameters=["body.*"], **scope)]).build(
            model_parts=[Model()],
            optimizers=[],
            manager=None,
            site=SiteOptions(ranks=SiteRanks(alone=True), labels=labels),
            register=False,
        )


def test_a_method_with_a_way_of_its_own_is_refused():
    with pytest.raises(ValueError, match='shared = "group"'):
        SemiSync.Config(method="noloco", scopes=[BY_LANGUAGE]).build(
            model_parts=[Model()], optimizers=[], manager=None, site=SiteOptions(ranks=SiteRanks(alone=True))
        )
