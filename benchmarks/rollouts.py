"""C4: rollouts, ours against plain and padded `generate`, continuous batching, and what TRL's GRPOTrainer does.

4 prompts (or `--prompts`) with 4 rollouts each, SmolLM2-135M with random weights, float32, temperature 1. Two kinds of
work: one turn of 8 to 96 tokens, and 4 turns of 4 to 48 tokens with observations of 8 to 64 between them. The lengths
are drawn beforehand and are the same for every case, so all sample equally many tokens; ours gives their
log-probabilities too. A case runs in a process of its own; rounds alternate, and each draws new prompts and lengths.

    python -m benchmarks.rollouts [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.chat_samples import SMOLLM2_135M, TINY
from benchmarks.meter import cost_of
from benchmarks.record import record
from benchmarks.rounds import Case, case_arguments, compare, peer_versions, run_rounds

PROMPTS, GROUP, PROMPT_TOKENS = 4, 4, (32, 96)
MEAN_LENGTH, SPREAD = {"one_turn": 32, "four_turns": 14}, 0.7
BOUNDS = {"one_turn": (8, 96), "four_turns": (4, 48)}
TURNS = {"one_turn": 1, "four_turns": 4}
OBSERVATION_TOKENS = (8, 64)
PEER = "benchmarks.peers.rollouts"
CASES = (
    Case("lit_reason", "keys and values kept over turns, rows that are done leave the batch", "benchmarks.rollouts"),
    Case("generate", "generate, one rollout after the other", PEER, True),
    Case("generate padded", "generate on all rollouts at once, padded on the left", PEER, True),
    Case("continuous", "continuous batching, blocks of a shared prefix computed once", PEER, True),
    Case("trl", "the generation of GRPOTrainer", PEER, True),
)


@dataclass(frozen=True)
class Work:
    """Rollouts to be made.

    Attributes:
        prompts: token ids of each prompt, GROUP rollouts each.
        lengths: by turn, tokens to sample on each rollout.
        observations: by turn but the last, ids to add to each rollout.
    """

    prompts: list[list[int]]
    lengths: list[list[int]]
    observations: list[list[list[int]]]

    @property
    def tokens(self) -> int:
        """Tokens to sample."""
        return sum(map(sum, self.lengths))


def work(kind: str, seed: int, vocabulary: int, prompts: int = PROMPTS) -> Work:
    """What a round asks for, a function of the seed.

    Args:
        kind: `one_turn` or `four_turns`.
        seed: of the round.
        vocabulary: ids are drawn from it.
        prompts: how many.
    """
    rng = np.random.default_rng([seed, TURNS[kind]])
    rows, turns, bounds = prompts * GROUP, TURNS[kind], BOUNDS[kind]

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(3, vocabulary, rng.integers(low, high, endpoint=True)).tolist()

    lengths = np.exp(rng.normal(np.log(MEAN_LENGTH[kind]), SPREAD, (turns, rows))).clip(*bounds).astype(int)
    observations = [[ids(*OBSERVATION_TOKENS) for _ in range(rows)] for _ in range(turns - 1)]
    return Work([ids(*PROMPT_TOKENS) for _ in range(prompts)], lengths.tolist(), observations)


def player(case: str, config: dict[str, Any]) -> Callable[[Work], list[list[int]]]:
    """A function that makes the rollouts and returns all ids of each.

    Args:
        case: `lit_reason`.
        config: of the model.
    """
    import torch

    from lit_reason.models.config import ModelConfig
    from lit_reason.models.language_model import LanguageModel
    from lit_reason.rollout.config import SamplingConfig
    from lit_reason.rollout.engine import Engine

    torch.manual_seed(0)
    lm = LanguageModel.load(ModelConfig(config=config))
    engine = Engine(lm, _NoText(), SamplingConfig(temperature=1.0, top_p=1.0), [config["vocab_size"]])

    def play(given: Work) -> list[list[int]]:
        live = list(range(len(given.prompts) * GROUP))
        turns, done = [0] * len(live), dict[int, list[int]]()
        with engine.round(0):  # as a training run plays: getting ready for the round is part of it
            engine.open(given.prompts)
            engine.fork(GROUP)
            while live:
                for i in engine.first_turns([given.lengths[turns[row]][row] for row in live]):
                    row = live[i]
                    turns[row] += 1
                    if turns[row] < len(given.lengths):
                        engine.append(i, given.observations[turns[row] - 1][row])
                    else:
                        done[row] = engine.ids(i)
                kept = [i for i, row in enumerate(live) if row not in done]
                if len(kept) < len(live):
                    engine.keep(kept)
                live = [live[i] for i in kept]
        return [done[row] for row in sorted(done)]

    return play


class _NoText:
    """The ids of random weights say nothing."""

    def decode(self, ids: Any, **options: Any) -> str:
        return ""


def run(make_player: Callable[[str, dict[str, Any]], Any], options: argparse.Namespace) -> dict[str, float]:
    """A short round to warm up, then the measured ones, of both kinds of work.

    Args:
        make_player: `player` of the case's module.
        options: parsed `arguments`.
    """
    import torch

    torch.set_num_threads(options.threads)
    config = TINY if options.tiny else SMOLLM2_135M
    play = make_player(options.case, config)
    play(Work([[5, 6, 7]], [[2, 3, 2, 3]] * 2, [[[8, 9]] * GROUP]))
    figures: dict[str, float] = {}
    for kind in TURNS:
        given = work(kind, options.seed, config["vocab_size"], options.prompts)
        cost, rows = cost_of(lambda given=given: play(given))
        told = sum(len(p) * GROUP for p in given.prompts) + sum(len(o) for turn in given.observations for o in turn)
        sampled = sum(map(len, rows)) - told
        if sampled != given.tokens:
            raise SystemExit(f"{options.case} sampled {sampled} tokens instead of {given.tokens}")
        figures |= {f"{name}_{kind}": value for name, value in cost.items()}
        figures[f"tokens_{kind}"] = sampled
    return figures


def arguments() -> argparse.ArgumentParser:
    """Arguments of the whole benchmark, and of one case, ours or a peer's."""
    parser = case_arguments(CASES, 5)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"each with {GROUP} rollouts")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run one case, or all in rounds and write the file."""
    options = arguments().parse_args()
    if options.case:
        print(json.dumps(run(player, options)))
        return
    same = ["--prompts", str(options.prompts), *(["--tiny"] if options.tiny else [])]
    runs = run_rounds(CASES, options.rounds, lambda turn: ["--seed", str(turn), *same], options.threads)
    keys = [f"{figure}_{kind}" for kind in TURNS for figure in ("cpu_s", "wall_s", "tokens")]
    result = compare(runs, CASES, "lit_reason", keys)
    if not options.tiny:
        settings = {"threads": options.threads, "rounds": options.rounds, "prompts": options.prompts}
        facts = {**settings, "peers": peer_versions(), "cases": result}
        print(record("rollouts", facts, ["random initial weights at the shapes of SmolLM2-135M"]))


if __name__ == "__main__":
    main()
