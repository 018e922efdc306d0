"""One run: an arm pre-trained, and what its body is worth afterwards with fresh embeddings."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from statistics import mean

import torch
from torch import nn

from titan_ext.dept.plasticity import adapt
from titan_ext.dept.tables import renew_tables
from titan_ext.experiments.dept.arms import ARMS, Measured, Result, Settings, Vocabulary
from titan_ext.experiments.dept.pretrain import Pretraining, body_of, pretrain, table_of
from titan_ext.experiments.dept.text import Texts
from titan_ext.experiments.models import finite, loss_of
from titan_ext.experiments.text import joined
from titan_ext.experiments.tuning import Run

_MEASUREMENTS = 12


def train(settings: Settings, texts: Texts, run: Run) -> Result:
    """Pre-train, then train the body with a fresh embedding twice: on the sites' languages, and on the unseen one.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    training = pretrain(settings, texts, run)
    trained, vocabulary = training.models[0], ARMS[run.method].vocabulary
    after = _Afterwards(settings, texts, run.seed)
    return Result(
        pretrained=_measured(settings, texts, training, vocabulary),
        continued=after.train(trained, "joint", settings.languages, settings.continued_steps),
        adapted=after.train(trained, "own", [settings.unseen], settings.adapt_steps),
        body=sum(each.numel() for each in body_of(trained).values()),
        joint_vocabulary=texts.tokens("joint", settings.languages[0]),
        vocabularies=[texts.tokens(vocabulary, language) for language in settings.languages],
        embeddings=[table_of(model).numel() for model in training.models],
        bytes_a_round=training.bytes_a_round,
        tokens_sha256=after.seen.hexdigest(),
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


def _measured(settings: Settings, texts: Texts, training: Pretraining, vocabulary: Vocabulary) -> Measured:
    """Each language under its site's model, right after the last round."""
    validation = Validation(texts, vocabulary, settings.languages)
    validation.measure(dict(zip(settings.languages, training.models, strict=True)))
    return validation.measured([settings.steps])


class _Afterwards:
    """Trainings of a body with a fresh embedding, the same for all arms.

    Their batches have as many sequences as those of all sites together, equally many of each language.
    """

    def __init__(self, settings: Settings, texts: Texts, seed: int) -> None:
        self._settings, self._texts, self._seed = settings, texts, seed
        self.seen = hashlib.sha256()
        """Of all that has been trained on."""

    def train(self, trained: nn.Module, vocabulary: Vocabulary, languages: Sequence[str], steps: int) -> Measured:
        """Train a copy of a model, with one embedding for all the languages."""
        model = deepcopy(trained)
        renew_tables(model, self._texts.tokens(vocabulary, languages[0]), seed=self._seed)
        validation = Validation(self._texts, vocabulary, languages)
        curve = adapt(
            model,
            self._mixture(vocabulary, languages),
            steps=steps,
            lr=self._settings.adapt_lr,
            evaluate=lambda: validation.measure(dict.fromkeys(languages, model)),
            every=max(1, steps // _MEASUREMENTS),
        )
        return validation.measured([step for step, _ in curve])

    def _mixture(
        self, vocabulary: Vocabulary, languages: Sequence[str]
    ) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        batch = self._settings.batch * len(self._settings.languages) // len(languages)
        sources = [
            self._texts.training(vocabulary, language, (self._seed, len(languages), place), batch)
            for place, language in enumerate(languages, start=1)
        ]
        for batches in zip(*sources):
            together = joined(batches)
            self.seen.update(together.inputs.cpu().numpy().data)
            yield {"input": together.inputs, "positions": together.positions}, together.labels


class Validation:
    """Validation losses of languages under one kind of vocabulary, and of unigram models on the same tokens.

    Args:
        texts: of the comparison.
        vocabulary: which kind.
        languages: to measure.
    """

    def __init__(self, texts: Texts, vocabulary: Vocabulary, languages: Sequence[str]) -> None:
        self._batches = {language: texts.validation(vocabulary, language) for language in languages}
        self._unigram = {
            language: texts.unigram(vocabulary, language).cross_entropy(joined(batches).labels)
            for language, batches in self._batches.items()
        }
        self._losses: dict[str, list[float | None]] = {language: [] for language in languages}

    @torch.no_grad()
    def measure(self, models: Mapping[str, nn.Module]) -> float:
        """Note each language's loss under its model; returns their mean, in nats a token."""
        found = {}
        for language, batches in self._batches.items():
            found[language] = mean(float(loss_of(models[language], batch)) for batch in batches)
            self._losses[language].append(finite(found[language]))
        return mean(found.values())

    def measured(self, steps: Sequence[int]) -> Measured:
        """What was noted, and the steps after which that was."""
        return Measured(steps=list(steps), losses=self._losses, unigram=self._unigram)
