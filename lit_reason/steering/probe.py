"""Logistic regression on activations, in torch: the posterior that says which features are sure of their class.

In torch and not in scikit-learn: some 60 lines, one dependency less, and the solution is checked against the
optimality conditions. Shape letters: N features, F width, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.steering.bank import mixed


class Probe(NamedTuple):
    """A linear classifier on features as they are; the scaling is folded in.

    Attributes:
        weight_KF: float32.
        bias_K: float32.
    """

    weight_KF: Tensor
    bias_K: Tensor

    def log_probs(self, features_NF: Tensor) -> Tensor:
        """Log-probability of each class, `[N, K]`."""
        return (features_NF @ self.weight_KF.T + self.bias_K).log_softmax(-1)


def balanced(labels_N: Tensor, classes: int) -> Tensor:
    """Weight of each feature such that all classes weigh the same and the mean weight is 1."""
    counts_K = labels_N.bincount(minlength=classes).double()
    return (len(labels_N) / ((counts_K > 0).sum() * counts_K))[labels_N]


def fit_probe(features_NF: Tensor, labels_N: Tensor, classes: int, penalty: float, steps: int = 200) -> Probe:
    """Multinomial logistic regression on standardised features, all classes weighing the same.

    Minimises `mean_i w_i * -log p(y_i | x_i) + penalty / 2 * |W|^2` by L-BFGS in float64; the biases are free.

    Args:
        features_NF: the features.
        labels_N: their classes.
        classes: K.
        penalty: see above, for the weights of standardised features; above 0.
        steps: most L-BFGS iterations.

    Returns:
        The probe for features that are not standardised.
    """
    with torch.inference_mode(False), torch.enable_grad():  # Lightning validates and tests in inference mode
        labels_N = labels_N.clone()
        mean_F = features_NF.double().mean(0)
        scale_F = features_NF.double().std(0, correction=0).clamp_min(1e-12)
        x_NF, weight_N = (features_NF.double() - mean_F) / scale_F, balanced(labels_N, classes)
        weight_KF = torch.zeros(classes, x_NF.shape[1], dtype=torch.float64, requires_grad=True)
        bias_K = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight_KF, bias_K],
            max_iter=steps,
            max_eval=3 * steps,
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            solver.zero_grad()
            nll_N = torch.nn.functional.cross_entropy(x_NF @ weight_KF.T + bias_K, labels_N, reduction="none")
            value = (weight_N * nll_N).mean() + penalty / 2 * weight_KF.square().sum()
            value.backward()
            return value

        solver.step(loss)
    found_KF = weight_KF.detach() / scale_F
    return Probe(found_KF.float(), (bias_K.detach() - found_KF @ mean_F).float())


def folds_of(labels_N: np.ndarray, rows_N: np.ndarray, folds: int, seed: int, names: list[str]) -> np.ndarray:
    """Which part each feature's text is in: whole texts, and of every class about as many in each part.

    Args:
        labels_N: classes.
        rows_N: text numbers.
        folds: parts.
        seed: of the draw.
        names: of the classes, for messages.

    Raises:
        UserError: a class has a single text, so that a probe without it knows nothing of the class.
    """
    part_of: dict[int, int] = {}
    for label in np.unique(labels_N):
        texts = np.unique(rows_N[labels_N == label])
        if len(texts) < 2:
            raise UserError(
                f"class '{names[label]}' has one text: out-of-fold confidence needs two at least; add texts, or set "
                "direction.folds to 0"
            )
        order = texts[np.argsort(mixed(seed, texts, np.zeros_like(texts)), kind="stable")]
        part_of.update({int(text): at % folds for at, text in enumerate(order)})
    return np.array([part_of[int(row)] for row in rows_N])


def out_of_fold(
    features_NF: Tensor,
    labels_N: np.ndarray,
    rows_N: np.ndarray,
    names: list[str],
    penalty: float,
    folds: int,
    seed: int,
) -> Tensor:
    """Log-probabilities by probes that have not seen the feature's text.

    Args:
        features_NF: the features.
        labels_N: their classes.
        rows_N: numbers of their texts.
        names: of the K classes.
        penalty: of the probe.
        folds: parts, at least 2.
        seed: of the parts.

    Returns:
        `[N, K]`.
    """
    part_N = torch.from_numpy(folds_of(labels_N, rows_N, folds, seed, names))
    target_N = torch.from_numpy(labels_N)
    found_NK = torch.zeros(len(labels_N), len(names))
    for part in part_N.unique():
        left_out = part_N == part
        probe = fit_probe(features_NF[~left_out], target_N[~left_out], len(names), penalty)
        found_NK[left_out] = probe.log_probs(features_NF[left_out])
    return found_NK
