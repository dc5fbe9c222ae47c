"""How tokens are sampled. No torch import here: the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of one batched generation.

    Args:
        max_new_tokens: upper limit of generated tokens a completion.
        temperature: softmax temperature; 0 is greedy.
        top_p: nucleus mass kept; 1 keeps all.
        top_k: number of most likely tokens kept; 0 keeps all.
        min_p: tokens below this share of the likeliest one's probability are left out; 0 keeps all.
        samples: completions a prompt.
        batch_size: sequences generated at once.
        seed: draws depend on (seed, prompt, sample) and never touch the global random state.
    """

    max_new_tokens: int = 256
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    samples: int = 1
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class DialogueConfig:
    """Limits of a multi-turn rollout.

    Args:
        group: rollouts of each prompt.
        max_turns: turns that may call a tool; one more is left for the answer.
        turn_tokens: most tokens of a turn.
        observation_tokens: most tokens of what the environment says; longer observations lose their middle.
        answer_tokens: room that is always kept for the last turn.
        total_tokens: most tokens of a rollout, prompt included.
        observation_role: role of the message that carries an observation in the chat template.
        keep_every: write the rollouts of every so many rounds to `rollouts.jsonl` in the run folder; 0 writes none.
        timeout_s: seconds after which an environment that does not answer has failed.
    """

    group: int = 8
    max_turns: int = 4
    turn_tokens: int = 256
    observation_tokens: int = 512
    answer_tokens: int = 64
    total_tokens: int = 2048
    observation_role: str = "user"
    keep_every: int = 0
    timeout_s: float = 30.0
