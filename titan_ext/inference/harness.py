"""A model of ours as lm-evaluation-harness wants it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from titan_ext.errors import UserError
from titan_ext.inference.decoding import Cached, generate
from titan_ext.inference.model import logits_of
from titan_ext.inference.sampling import Sampler, TextStream

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.models.common.decoder import Decoder


class HarnessModel(TemplateLM):
    """Scores and continues text at one number of iterations.

    A text begins with the tokenizer's mark of the beginning, as training documents do.

    Args:
        model: in evaluation mode.
        tokenizer: the site's.
        vocabulary: ids of the tokenizer.
        iterations: of a model that iterates; None for any other.
        length: tokens that the model sees at most; longer texts lose their beginning.
        batch_size: texts scored together.

    Raises:
        UserError: the tokenizer marks neither the beginning nor the end of a text.
    """

    def __init__(
        self,
        model: "Decoder",
        tokenizer: "BaseTokenizer",
        vocabulary: int,
        *,
        iterations: int | None,
        length: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._iterations = iterations
        self._length = length
        self._batch_size = batch_size
        marks = [each for each in (getattr(tokenizer, "bos_id", None), tokenizer.eos_id) if each is not None]
        if not marks:
            raise UserError("--tasks: need a tokenizer with a mark of the beginning or of the end of a text")
        self._first_mark, self._last_mark = marks[0], marks[-1]

    @property
    def eot_token_id(self) -> int:
        """The mark of a text's end."""
        return self._last_mark

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self._first_mark

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; the mark of the beginning is left out where ``add_special_tokens`` is False."""
        return self._tokenizer.encode(string, add_bos=add_special_tokens is not False, add_eos=False)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's length."""
        return [self._rolling(request.args[0]) for request in requests]

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each text up to one of its stop texts, which is left out."""
        return [self._continuation(*request.args) for request in requests]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the most likely one token by token."""
        # Texts of one length together need the least padding.
        order = sorted(range(len(requests)), key=lambda place: len(requests[place][1]) + len(requests[place][2]))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            found |= zip(places, self._scores([requests[place][1:] for place in places]), strict=True)
        return [found[place] for place in range(len(requests))]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        device = next(self._model.parameters()).device
        texts = [torch.tensor((context + continuation)[-self._length - 1 :]) for context, continuation in pairs]
        # What pads a text stands behind it, where no token of the text can see it.
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)[:, :-1].to(device)
        positions = torch.arange(padded.shape[1], device=device).expand(padded.shape)
        logits = logits_of(self._model, padded, positions, iterations=self._iterations)
        scores = []
        for row, text, (_, continuation) in zip(logits, texts, pairs, strict=True):
            end = len(text) - 1
            begin = max(0, end - len(continuation))
            targets = text[begin + 1 :].to(device)
            predicted = row[begin:end, : self._vocabulary].float().log_softmax(-1)
            likelihood = predicted.gather(1, targets[:, None]).sum().item()
            scores.append((likelihood, bool((predicted.argmax(-1) == targets).all())))
        return scores

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._length,
            context_len=1,
        )
        scores = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
        return sum(likelihood for likelihood, _ in scores)

    def _continuation(self, context: str, settings: dict[str, Any]) -> str:
        chosen = normalize_gen_kwargs(settings)
        room = min(chosen["max_gen_toks"], self._length - 1)
        prompt = self.tok_encode(context)[room - self._length :]
        sampler = Sampler(self._vocabulary, chosen.get("temperature", 0.0))
        decoding = Cached(self._model, self._iterations, len(prompt) + room)
        stream = TextStream(self._tokenizer, prompt)
        for token in generate(decoding, prompt, sampler, room, self._tokenizer.eos_id):
            stream.push(token)
            ends = [place for stop in chosen["until"] if stop and (place := stream.text.find(stop)) >= 0]
            if ends:
                return stream.text[: min(ends)]
        stream.flush()
        return stream.text
