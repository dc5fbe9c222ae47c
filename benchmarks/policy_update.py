"""C3: one policy update on given rollouts, ours against TRL's GRPOTrainer.

4 prompts with 4 completions of 64 to 128 tokens, SmolLM2-135M with random weights, float32, AdamW. The update:
reference log-probabilities by a second model, policy log-probabilities and entropies, clipped surrogate, k3 estimate of
the divergence, entropy bonus, mean over completion tokens, backward, clipping, optimizer step. A case runs in a process
of its own; rounds alternate, and each draws new rollouts, the same for both.

    python -m benchmarks.policy_update [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.chat_samples import SMOLLM2_135M, TINY
from benchmarks.meter import cost_of
from benchmarks.record import record
from benchmarks.rounds import Case, case_arguments, compare, peer_versions, run_rounds

PROMPTS, GROUP, PROMPT_TOKENS, COMPLETION_TOKENS = 4, 4, (32, 96), (64, 128)
CLIP_RATIO, KL_WEIGHT, ENTROPY_WEIGHT, CLIP_NORM, LEARNING_RATE = 0.2, 0.04, 0.01, 1.0, 1e-6
CASES = (
    Case(
        "lit_reason", "packed rows, loss in one pass over the logits of completion tokens", "benchmarks.policy_update"
    ),
    Case("trl", "GRPOTrainer.compute_loss, padded rows", "benchmarks.peers.policy_update", True),
)


@dataclass(frozen=True)
class Rollout:
    """A completion with what the update needs to know of it.

    Attributes:
        prompt: token ids.
        completion: token ids.
        old_logp: log-probability of each completion token when it was sampled.
        advantage: of the whole completion.
    """

    prompt: list[int]
    completion: list[int]
    old_logp: list[float]
    advantage: float


def rollouts(seed: int, vocabulary: int) -> list[Rollout]:
    """Random rollouts whose ratios lie on both sides of the clipping bounds for a model with random weights."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(PROMPTS):
        prompt = rng.integers(3, vocabulary, rng.integers(*PROMPT_TOKENS, endpoint=True)).tolist()
        for _ in range(GROUP):
            completion = rng.integers(3, vocabulary, rng.integers(*COMPLETION_TOKENS, endpoint=True)).tolist()
            old = rng.normal(-np.log(vocabulary), 0.5, len(completion)).tolist()
            made.append(Rollout(prompt, completion, old, float(rng.normal())))
    return made


def updates(config: dict[str, Any], folder: str | None = None) -> Any:
    """A function that makes one update on rollouts and returns the loss.

    Args:
        config: of the policy and the reference.
        folder: not used here; the peer keeps its weights there.
    """
    import torch

    from lit_reason.kernels.epilogues import entropy_bonus, k3_kl, ppo_clip, total
    from lit_reason.kernels.token_logprobs import token_logprobs
    from lit_reason.models.config import ModelConfig
    from lit_reason.models.language_model import LanguageModel

    torch.manual_seed(0)
    policy, reference = (LanguageModel.load(ModelConfig(config=config)) for _ in range(2))
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def update(given: list[Rollout]) -> float:
        ids = torch.tensor([token for r in given for token in r.prompt + r.completion])
        lengths = [len(r.prompt) + len(r.completion) for r in given]
        edges = torch.tensor([0, *np.cumsum(lengths).tolist()])
        packed = (ids, torch.cat([torch.arange(n) for n in lengths]), edges)
        ends = zip(edges[1:].tolist(), given, strict=True)
        tokens = torch.cat([torch.arange(end - len(r.completion), end) for end, r in ends])
        targets, predicting = ids[tokens], tokens - 1
        old = torch.tensor([logp for r in given for logp in r.old_logp])
        advantage = torch.tensor([r.advantage for r in given for _ in r.completion])
        with torch.no_grad():
            ref = token_logprobs(reference.hidden(*packed)[predicting], reference.head.weight, targets).logp_S
        loss = total(
            ppo_clip(advantage, old, clip_low=CLIP_RATIO, clip_high=CLIP_RATIO),
            k3_kl(KL_WEIGHT, ref),
            entropy_bonus(ENTROPY_WEIGHT),
        )
        share = torch.full((len(tokens),), 1 / len(tokens))
        out = policy.head(policy.hidden(*packed)[predicting], targets, share, loss=loss)
        out.loss_sum.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss_sum.detach())

    return update


def run(make_updates: Any, options: argparse.Namespace) -> dict[str, float]:
    """Two short updates to warm up, then the measured one; its seconds, rise of memory, and the losses of all.

    Args:
        make_updates: `updates` of the case.
        options: parsed `arguments`.
    """
    import tempfile

    import torch

    torch.set_num_threads(options.threads)
    config = TINY if options.tiny else SMOLLM2_135M
    given = rollouts(options.seed, config["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        update = make_updates(config, folder)
        short = [Rollout(r.prompt[:4], r.completion[:4], r.old_logp[:4], r.advantage) for r in given[:: len(given) - 1]]
        first = update(short)
        second = update(short)
        cost, third = cost_of(lambda: update(given))
    return {**cost, "loss": third, "first_loss": first, "second_loss": second}


def arguments() -> argparse.ArgumentParser:
    """Arguments of the whole benchmark, and of one case, ours or the peer's."""
    parser = case_arguments(CASES, 5)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run one case, or both in rounds and write the file."""
    options = arguments().parse_args()
    if options.case:
        print(json.dumps(run(updates, options)))
        return
    tiny = ["--tiny"] if options.tiny else []
    runs = run_rounds(CASES, options.rounds, lambda turn: ["--seed", str(turn), *tiny], options.threads)
    result = compare(runs, CASES, "trl", ["cpu_s", "wall_s", "rise_mib", "loss", "second_loss"])
    if not options.tiny:
        print(record("policy_update", {"threads": options.threads, "peers": peer_versions(), "cases": result}))


if __name__ == "__main__":
    main()
