"""How tokens are sampled. No torch import here: the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_reason.errors import UserError


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
class BackendConfig:
    """What samples the turns of a rollout.

    Args:
        name: `own` samples with the trainer's weights and keeps keys and values between turns; `continuous` is the
            continuous batching of transformers; `server` an OpenAI-compatible server such as vLLM, by token ids.
        url: of the server, for instance `http://127.0.0.1:8000`.
        model: name under which the server knows the model that is trained from.
        sync: `adapter` writes the adapter to `folder` before each round and has the server load it; `none` leaves the
            server as it is, so that its rollouts are of version 0 for ever.
        folder: where adapters are written; the server reads them under the same path.
        most_lag: policy updates that the server's weights may be behind the trainer's; beyond, the run stops.
        most_gap: mean difference in nats between log-probabilities of the server and of the trainer's weights, above
            which the run stops: they are not the same weights then, or not the same numbers. Checked on the first turn
            of every round that has no lag.
        logprobs: what the server reports: `raw` those of temperature 1 (vLLM's default), `processed` those of the
            distribution it draws from (`--logprobs-mode processed_logprobs`).
        requests: requests under way at once.
        timeout_s: seconds after which the server has failed.
        gather: whether `own` holds the weights of an fsdp2 run whole on each process during a round, gathered once;
            false gathers them layer by layer at every token, for a model that does not fit on one device.
    """

    name: Literal["own", "continuous", "server"] = "own"
    url: str = ""
    model: str = ""
    sync: Literal["adapter", "none"] = "adapter"
    folder: str = ""
    most_lag: int = 0
    most_gap: float = 0.1
    logprobs: Literal["raw", "processed"] = "raw"
    requests: int = 64
    timeout_s: float = 600.0
    gather: bool = True

    def __post_init__(self) -> None:
        if self.name == "server" and not (self.url and self.model):
            raise UserError("dialogue.backend server needs url and model: where it is, and what it calls the model")
        if self.name == "server" and self.sync == "adapter" and not self.folder:
            raise UserError("dialogue.backend.sync adapter needs folder: where the server finds adapters")
        for name, least in (("most_lag", 0), ("requests", 1)):
            if getattr(self, name) < least:
                raise UserError(f"dialogue.backend.{name} is {getattr(self, name)}; it must be at least {least}")


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
        backend: what samples.
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
    backend: BackendConfig = BackendConfig()
