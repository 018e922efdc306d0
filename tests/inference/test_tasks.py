"""Scores of lm-evaluation-harness on tiny tasks of our own; they run where the extra ``eval`` is installed."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from tests.models.abbie_models import build
from titan_ext.data import ByteTokenizer
from titan_ext.errors import UserError
from titan_ext.inference.decoding import Uncached, generate
from titan_ext.inference.harness import HarnessModel
from titan_ext.inference.model import logits_of
from titan_ext.inference.sampling import Sampler
from titan_ext.inference.tasks import Tasks

VOCABULARY, BOS = 259, 256
CHOICES = [
    {"question": "for i", "choices": [" in range(3):", " zzz"], "answer": 0},
    {"question": "return", "choices": [" x", " self.value"], "answer": 1},
]
CLOZE = [{"context": "def f(self):\n    return", "word": " self"}, {"context": "import os\nimport", "word": " sys"}]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
output_type: {kind}
{rest}
"""
KINDS = {
    "tiny_choice": (
        "multiple_choice",
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer',
    ),
    "tiny_cloze": ("loglikelihood", 'doc_to_text: "{{context}}"\ndoc_to_target: "{{word}}"'),
    "tiny_text": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{context}}"\nmetric_list: [{metric: bits_per_byte}]',
    ),
    "tiny_writing": (
        "generate_until",
        'doc_to_text: "{{context}}"\ndoc_to_target: "{{word}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]',
    ),
}


def harness(iterations: int = 2, length: int = 64, batch_size: int = 2) -> HarnessModel:
    model = build(vocab_size=264)
    return HarnessModel(model, ByteTokenizer(), VOCABULARY, iterations=iterations, length=length, batch_size=batch_size)


def likelihood(tokens: list[int], first: int, iterations: int = 2) -> float:
    """Log-likelihood of the tokens from ``first`` on, after those before."""
    with torch.no_grad():
        logits = logits_of(
            build(vocab_size=264), torch.tensor([tokens]), torch.arange(len(tokens))[None], iterations=iterations
        )
    odds = logits[0, :, :VOCABULARY].double().log_softmax(-1)
    return sum(odds[place - 1, tokens[place]].item() for place in range(first, len(tokens)))


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    for name, lines in (("choice", CHOICES), ("cloze", CLOZE)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, (kind, rest) in KINDS.items():
        data = tmp_path / ("choice.jsonl" if name == "tiny_choice" else "cloze.jsonl")
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, rest=rest))
    return tmp_path


@pytest.mark.parametrize("iterations", [1, 4])
def test_likelihoods_are_the_models(iterations):
    """Whatever the order, the padding and the batch."""
    pairs = [("a longer context", " b"), ("ab", " a longer continuation"), ("", "abc"), ("ab ", "c")]
    found = harness(iterations).loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found):
        tokens = [BOS, *(context + continuation).encode()]
        first = 1 + len(context.rstrip().encode())
        assert score == pytest.approx(likelihood(tokens, first, iterations), rel=1e-4)
        assert greedy is False


def test_the_most_likely_continuation_is_called_greedy():
    model = build(vocab_size=264)
    tokens = list(generate(Uncached(model, 2), [BOS, *b"ab"], Sampler(128, 0.0), 3))
    (found,) = harness().loglikelihood(requests("loglikelihood", ("ab", bytes(tokens).decode())), disable_tqdm=True)
    alone = Sampler(VOCABULARY, 0.0)
    assert found[1] is (list(generate(Uncached(model, 2), [BOS, *b"ab"], alone, 3)) == tokens)


def test_long_texts_lose_their_beginning():
    text = "a context that is far too long" * 4
    (found,) = harness(length=16).loglikelihood(requests("loglikelihood", (text, " end")), disable_tqdm=True)
    assert found[0] == pytest.approx(likelihood(list((text + " end").encode())[-17:], 13), rel=1e-4)


def test_a_whole_text_is_scored_in_windows():
    text = "twelve bytes"
    (found,) = harness(length=8).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    windows = likelihood([BOS, *text.encode()[:8]], 1) + likelihood(list(text.encode()[3:]), 5)
    assert found == pytest.approx(windows, rel=1e-4)


def test_writing_stops_where_it_is_told_to():
    def write(*until: str) -> str:
        settings = {"until": list(until), "max_gen_toks": 12}
        (text,) = harness().generate_until(requests("generate_until", ("def f", settings)))
        return text

    whole = write()
    tokens = generate(Uncached(build(vocab_size=264), 2), [BOS, *b"def f"], Sampler(VOCABULARY, 0.0), 12)
    assert whole == ByteTokenizer().decode(list(tokens))
    stop = whole[len(whole) // 2 :][:1]
    assert write("never", stop) == whole[: whole.index(stop)]


def test_tasks_of_every_kind(task_folder):
    tasks = Tasks(list(KINDS), task_folder, limit=None)
    scores = {(score.task, score.metric): score for score in tasks.score(harness())}
    assert all(score.examples == 2 for score in scores.values())
    # The model is as initialised: the longer choice is the less likely one.
    assert scores["tiny_choice", "acc"].value == 0.0
    bytes_ = [line["context"].encode() for line in CLOZE]
    bits = -sum(likelihood([BOS, *text], 1) for text in bytes_) / sum(map(len, bytes_)) / math.log(2)
    assert scores["tiny_text", "bits_per_byte"].value == pytest.approx(bits, rel=1e-4)
    words = [likelihood([BOS, *(line["context"] + line["word"]).encode()], 1 + len(line["context"])) for line in CLOZE]
    assert scores["tiny_cloze", "perplexity"].value == pytest.approx(math.exp(-sum(words) / 2), rel=1e-3)
    assert scores["tiny_writing", "exact_match"].value == 0.0
    assert {score.examples for score in Tasks(["tiny_choice"], task_folder, limit=1).score(harness())} == {1}


def test_tasks_that_cannot_run_are_said(task_folder):
    with pytest.raises(UserError, match="unknown task; did you mean 'tiny_cloze'"):
        Tasks(["tiny_clozes"], task_folder, None)
    with pytest.raises(UserError, match="no such folder"):
        Tasks(["tiny_cloze"], task_folder / "nowhere", None)
    (task_folder / "cloze.jsonl").unlink()
    with pytest.raises(UserError, match="--tasks tiny_cloze: its data is not on this machine"):
        Tasks(["tiny_cloze"], task_folder, None)
