"""A judge of generated texts that shares nothing with the probe: words instead of activations, and texts of its own.

Shape letters: N texts, V words, K classes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_reason.steering.probe import fit_probe

WORD = re.compile(r"[^\W\d_]{2,}")


class WordJudge:
    """TF-IDF of words and logistic regression.

    Weights are `(1 + log count) * log((1 + N) / (1 + texts with the word))`, each text brought to length 1.

    Args:
        texts: labelled texts, others than the directions were found in.
        labels: their classes, 0 to `classes - 1`.
        classes: K.
        min_texts: words in fewer texts are left out.
        penalty: of the regression.
    """

    def __init__(
        self, texts: Sequence[str], labels: Sequence[int], classes: int, min_texts: int = 2, penalty: float = 1e-3
    ) -> None:
        counted = [Counter(words(text)) for text in texts]
        seen_in = Counter(word for counts in counted for word in counts)
        kept = sorted(word for word, n in seen_in.items() if n >= min_texts) or sorted(seen_in) or [""]
        self.column = {word: at for at, word in enumerate(kept)}
        self.rarity_V = torch.tensor([math.log((1 + len(texts)) / (1 + seen_in[word])) for word in kept])
        self.classes = classes
        self.model = fit_probe(self._features(counted), torch.tensor(labels), classes, penalty)

    def _features(self, counted: Sequence[Counter[str]]) -> Tensor:
        x_NV = torch.zeros(len(counted), len(self.column))
        for row, counts in enumerate(counted):
            for word, n in counts.items():
                if word in self.column:
                    x_NV[row, self.column[word]] = 1 + math.log(n)
        x_NV = x_NV * self.rarity_V
        return x_NV / x_NV.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    def probs(self, texts: Sequence[str]) -> Tensor:
        """Probability of each class, `[N, K]`; of a text without a known word, by the biases alone."""
        return self.model.log_probs(self._features([Counter(words(text)) for text in texts])).exp()

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The likeliest class of each text."""
        return self.probs(texts).argmax(-1).tolist() if len(texts) else []


def words(text: str) -> list[str]:
    """Lower-case words of two letters or more."""
    return WORD.findall(text.lower())


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words as a share of all n-grams, over all texts together; 0 without any.

    Args:
        texts: generated texts.
        n: words in an n-gram.
    """
    grams = [tuple(ws[i : i + n]) for ws in map(words, texts) for i in range(len(ws) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
