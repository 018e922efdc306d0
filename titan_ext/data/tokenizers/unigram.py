"""The unigram model that losses of different vocabularies are measured against (UNIGRAM-CE of DEPT, section 4.3)."""

import torch


class Unigram:
    """Each token by its frequency alone, with one occurrence added to each so that none is impossible.

    Args:
        counts: ``[vocabulary]``, occurrences of each token.

    Raises:
        ValueError: no token, or a negative count.
    """

    def __init__(self, counts: torch.Tensor) -> None:
        if counts.ndim != 1 or not len(counts) or bool((counts < 0).any()):
            raise ValueError(f"counts of shape {list(counts.shape)}: must be [vocabulary], none negative")
        smoothed = counts.detach().to("cpu", torch.float64) + 1
        self.log_probabilities = smoothed.log() - smoothed.sum().log()
        """``[vocabulary]`` float64, on the CPU: ln((count + 1) / (sum of counts + vocabulary))."""

    def cross_entropy(self, tokens: torch.Tensor) -> float:
        """Mean negative log-likelihood of tokens, in nats a token.

        Args:
            tokens: any shape, integers from 0 to below the vocabulary.

        Raises:
            ValueError: there is no token, or one outside the vocabulary.
        """
        flat = tokens.detach().flatten().cpu()
        vocabulary = len(self.log_probabilities)
        if not len(flat) or int(flat.min()) < 0 or int(flat.max()) >= vocabulary:
            raise ValueError(f"tokens must be at least one, each from 0 to {vocabulary - 1}")
        return -float(self.log_probabilities[flat.long()].mean())
