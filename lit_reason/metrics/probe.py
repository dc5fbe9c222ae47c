"""How good a probe's probabilities are on texts that it has not seen.

Shape letters: N features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


class ProbeMeter(MetricCollection):
    """Accuracy by feature and by text, log-loss, calibration, and the share of each class that a threshold keeps.

    Args:
        names: of the K classes.
        beta: threshold on the probability of a feature's own class.
    """

    def __init__(self, names: Sequence[str], beta: float) -> None:
        classes = len(names)
        parts: dict[str, Metric | MetricCollection] = {
            "probe_accuracy": MulticlassAccuracy(classes, average="micro"),
            "probe_calibration_error": MulticlassCalibrationError(classes),
            "probe_loss": MeanMetric(),
            "text_accuracy": MulticlassAccuracy(classes, average="micro"),
            **{f"kept_{name}": MeanMetric() for name in names},
        }
        super().__init__(parts, compute_groups=False)
        self.names, self.beta = list(names), beta

    def update(self, log_probs_NK: Tensor, labels_N: Tensor, texts_N: Tensor) -> None:  # type: ignore[override]
        """Add features.

        Args:
            log_probs_NK: log-probability of each class.
            labels_N: the true classes.
            texts_N: number of the text that each feature is part of; a text comes whole.
        """
        if not len(labels_N):
            return
        own_N = log_probs_NK.gather(1, labels_N[:, None])[:, 0]
        self["probe_accuracy"].update(log_probs_NK, labels_N)
        self["probe_calibration_error"].update(log_probs_NK.exp(), labels_N)
        self["probe_loss"].update(-own_N)
        for k, name in enumerate(self.names):
            self[f"kept_{name}"].update((own_N[labels_N == k].exp() > self.beta).float())
        _, text_N = texts_N.unique(return_inverse=True)
        summed_RK = torch.zeros(int(text_N.max()) + 1, log_probs_NK.shape[1], device=log_probs_NK.device)
        label_R = torch.zeros(len(summed_RK), dtype=torch.long, device=labels_N.device)
        label_R[text_N] = labels_N
        self["text_accuracy"].update(summed_RK.index_add_(0, text_N, log_probs_NK), label_R)
