"""Planned memory against what torch's allocator really hands out, and against the published formulas and figures."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lit_reason.core.config import OptimConfig
from lit_reason.core.memory_methods import METHODS, method_bytes
from lit_reason.core.memory_trace import _pack, trace_step
from lit_reason.core.optim import build_optimizer
from lit_reason.errors import UserError
from lit_reason.models.config import LowRankConfig, ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.lowrank import hidden_matrices
from lit_reason.regimes.sft.regime import SFTRegime

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LENGTHS = [64] * 8
CASES = {
    "full": ({}, {}, 1),
    "low-rank": ({"lowrank": LowRankConfig(rank=16)}, {}, 1),
    "sltrain": ({"lowrank": LowRankConfig(rank=16, sparse_density=0.03)}, {}, 1),
    "two micro-batches": ({}, {}, 2),
    "gradient checkpointing": ({"gradient_checkpointing": True}, {}, 1),
    "bfloat16": ({"dtype": "bfloat16"}, {}, 1),
    "muon": ({}, {"optimizer": "muon"}, 1),
}


def regime_of(model: dict, optim: dict) -> SFTRegime:
    return SFTRegime(ModelConfig(config=SHAPE, **model), OptimConfig(lr=1e-3, **optim))


def measured_peak(regime: SFTRegime, accumulate: int) -> tuple[int, int]:
    """Peak of a real step by the events of torch's CPU allocator, and the bytes of real optimizer state."""
    regime.lm = LanguageModel.load(regime.lm_config)
    optimizer = build_optimizer(regime, regime.optim_config)
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)

    def step():
        for _ in range(accumulate):
            pack = _pack(LENGTHS, boundaries)
            pack.ids.random_(0, 1000), pack.targets.random_(0, 1000), pack.target_weight.fill_(1e-3)
            pack.positions.copy_(torch.arange(64).repeat(8))
            pack.index.copy_(torch.arange(len(pack.index)))
            regime.score(pack).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*regime.lm.parameters(), *regime.lm.buffers()]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    before = sum(t.numel() * t.element_size() for t in held + state)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return before + peak, sum(t.numel() * t.element_size() for t in state)


@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_within_5_percent_of_what_torch_allocates(case):
    model, optim, accumulate = CASES[case]
    regime = regime_of(model, optim)
    with torch.device("meta"):
        regime.lm = LanguageModel.load(regime.lm_config)
    planned = trace_step(regime, LENGTHS, accumulate=accumulate)
    peak, state = measured_peak(regime_of(model, optim), accumulate)
    assert planned.peak == pytest.approx(peak, rel=0.05)
    assert planned.optimizer == state
    assert planned.peak > planned.weights + planned.optimizer + planned.activations / 2
    assert planned.gradients == planned.trained * (2 if case == "bfloat16" else 4)


def test_planning_a_model_that_would_not_fit_takes_no_memory():
    huge = {**SHAPE, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2, "num_attention_heads": 64}
    regime = SFTRegime(ModelConfig(config=huge), OptimConfig())
    with torch.device("meta"):
        regime.lm = LanguageModel.load(regime.lm_config)
    planned = trace_step(regime, [128] * 4)
    matrices = 4 * 8192**2 + 3 * 8192 * 28672
    assert planned.parameters == 2 * matrices + 5 * 8192 + 2 * 1000 * 8192
    assert planned.weights == pytest.approx(4 * planned.parameters, rel=1e-6)
    assert planned.optimizer == pytest.approx(8 * planned.parameters, rel=1e-6)


# Glentis et al. (arXiv 2505.22922) and GaLore: the LLaMA sizes of the literature, sides and ranks.
SIZES = {
    "60M": (512, 1376, 8, 8, 128),
    "130M": (768, 2048, 12, 12, 256),
    "350M": (1024, 2736, 24, 16, 256),
    "1B": (2048, 5461, 24, 32, 512),
}
# Decimal gigabytes in bfloat16, indices of 8 bytes: weights and state (with gradients).
FIGURES = {
    "full": "0.35 (0.46) 0.80 (1.07) 2.21 (2.94) 8.03 (10.71)",
    "low-rank": "0.26 (0.34) 0.56 (0.75) 1.11 (1.48) 3.66 (4.87)",
    "SLTrain": "0.27 (0.35) 0.60 (0.79) 1.24 (1.63) 4.16 (5.45)",
    "LoRA, ReLoRA": "0.31 (0.39) 0.73 (0.92) 1.72 (2.09) 6.07 (7.29)",
    "GaLore, Fira": "0.28 (0.40) 0.61 (0.88) 1.39 (2.12) 4.76 (7.44)",
    "APOLLO": "0.27 (0.39) 0.58 (0.85) 1.30 (2.04) 4.41 (7.09)",
    "APOLLO-Mini": "0.25 (0.36) 0.47 (0.73) 1.00 (1.74) 3.21 (5.88)",
}
PARAMETERS = {"60M": (58.1, 42.8), "130M": (134.1, 94.0), "350M": (368.0, 185.2), "1B": (1339.1, 609.3)}


def sized(size: str, lowrank: LowRankConfig | None = None) -> LanguageModel:
    hidden, inner, layers, heads, _ = SIZES[size]
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    fields = {**SHAPE, **shape, "num_attention_heads": heads, "vocab_size": 32000}
    with torch.device("meta"):
        return LanguageModel.load(ModelConfig(config=fields, lowrank=lowrank))


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    rank, number = SIZES[size][-1], list(SIZES).index(size)
    dense, low = sized(size), sized(size, LowRankConfig(rank=rank))
    counts = [lm.parameter_counts().total / 1e6 for lm in (dense, low)]
    assert counts == pytest.approx(PARAMETERS[size], abs=0.05)
    matrices, held = hidden_matrices(dense.base)
    assert (sorted(matrices), len(matrices)) == (sorted(hidden_matrices(low.base)[0]), 7 * SIZES[size][2])
    others = dense.parameter_counts().total - held
    assert others == low.parameter_counts().total - hidden_matrices(low.base)[1]
    for method in METHODS:
        found = method_bytes(method, matrices, others, rank, index_bytes=8)
        without, with_gradients = FIGURES[method].replace("(", "").replace(")", "").split()[2 * number :][:2]
        sums = (found.weights + found.optimizer) / 1e9, sum(found) / 1e9
        assert [f"{value:.2f}" for value in sums] == [without, with_gradients], method


def test_narrow_indices_halve_their_share():
    matrices = [(100, 200)] * 3
    wide, narrow = (method_bytes("SLTrain", matrices, 0, 8, index_bytes=size) for size in (8, 4))
    assert wide.weights - narrow.weights == 3 * 600 * 4
    with pytest.raises(UserError, match="method is 'sltrain'"):
        method_bytes("sltrain", matrices, 0, 8)
