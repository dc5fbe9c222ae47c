"""Third session (9 minutes): G5, a fine-tuning step of Qwen2.5 shapes, and G6, the memory and time of optimizers.

python -m benchmarks.gpu.run3 [--budget-s 540] [--cpu]

Weights are random. The 7B shape has 4 of its 28 layers, which is said wherever it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.chat_samples import TINY
from benchmarks.gpu.session import Session, arguments
from lit_reason.core.config import OptimConfig, OptimizerName, SubspaceConfig
from lit_reason.core.memory_methods import method_bytes
from lit_reason.core.optim import build_optimizer
from lit_reason.kernels.dispatch import backends_used
from lit_reason.metrics.flops import model_flops
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel

DATASHEET_TFLOPS = 989  # H100 and H200, bfloat16, dense
TRAINED_SHARE = 0.4


def _qwen(width: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    }


MODELS = {
    "Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-7B, 4 of 28 layers": _qwen(3584, 18944, 4, 28, 4, 152064, False),
}
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


class Work:
    """Documents of equal length, so that rows side by side need no padding, with the last 40 % of each trained.

    Args:
        session: gives the device.
        vocabulary: of the tokens.
    """

    def __init__(self, session: Session, vocabulary: int) -> None:
        rows, length = (2, 16) if session.tiny else (16, 1024)
        device = session.device
        self.ids = torch.randint(3, vocabulary, (rows, length), device=device)
        trained = torch.arange(length, device=device) >= round((1 - TRAINED_SHARE) * length)
        self.labels = self.ids.masked_fill(~trained, -100)
        self.lengths = (length,) * rows
        self.positions = torch.arange(length, device=device).repeat(rows)
        self.edges = torch.arange(rows + 1) * length
        self.tokens = trained.repeat(rows).nonzero()[:, 0]

    def packed_loss(self, model: LanguageModel) -> torch.Tensor:
        """Ours: rows end to end, the head on rows that predict a trained token."""
        ids = self.ids.flatten()
        hidden = model.hidden(ids, self.positions, self.edges)
        share = torch.full((len(self.tokens),), 1 / len(self.tokens), device=ids.device)
        return model.head(hidden[self.tokens - 1], ids[self.tokens], share).loss_sum

    def plain_loss(self, model: nn.Module) -> torch.Tensor:
        """transformers' own."""
        return model(input_ids=self.ids, labels=self.labels, use_cache=False).loss

    def trl_loss(self, model: nn.Module) -> torch.Tensor:
        """TRL's fused head on a transformers model, as its SFTTrainer calls it."""
        return model(input_ids=self.ids, labels=self.labels, use_cache=False, fused_lm_head=True).loss


def training_step(session: Session, config: dict[str, Any], kind: str) -> dict[str, Any]:
    """G5: time, memory and utilisation of an optimizer step.

    Args:
        session: gives device, clock and measured ceilings.
        config: of the model.
        kind: `lit_reason`, `lit_reason compiled`, `transformers`, `transformers compiled` or `trl`.
    """
    torch.manual_seed(0)
    work = Work(session, config["vocab_size"])
    dtype: Any = "float32" if session.tiny else "bfloat16"
    if kind.startswith("lit_reason"):
        ours = LanguageModel.load(ModelConfig(config=config, dtype=dtype, compile=kind.endswith("compiled")))
        model: nn.Module = ours.to(session.device)
        loss: Callable[[Any], torch.Tensor] = work.packed_loss
        plain = ours.hf
    else:
        fields = {k: v for k, v in config.items() if k != "model_type"}
        made = AutoConfig.for_model(config["model_type"], **fields)
        torch.manual_seed(0)  # the same weights as ours
        plain = AutoModelForCausalLM.from_config(made, dtype=session.dtype).to(session.device).train()
        model, loss = plain, work.plain_loss
        if kind == "trl":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(plain)
            loss = work.trl_loss
        elif kind.endswith("compiled"):
            model = torch.compile(plain)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    losses: list[torch.Tensor] = []

    def step() -> None:
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())

    step()
    figures: dict[str, Any] = session.measure([step])
    cost = model_flops(plain)
    assert cost is not None
    tflops = cost.step(work.lengths, len(work.tokens)) / figures["ms"] / 1e9
    figures["tokens_per_s"] = 1e3 * work.ids.numel() / figures["ms"]
    figures["tflops"], figures["mfu_datasheet"] = tflops, tflops / DATASHEET_TFLOPS
    figures["mfu_measured"] = tflops / session.cases["ceilings"]["matmul_tflops"]
    figures["first_loss"] = float(losses[0])
    if kind == "lit_reason":
        figures["longest_kernels"] = _longest(step, session)
    return figures


def _longest(step: Callable[[], None], session: Session, count: int = 12) -> list[list[Any]]:
    """Names and milliseconds of the kernels (operators on a CPU) that took longest in one step."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] if session.tiny else [activity.CPU, activity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiled:
        step()
    time = "self_cpu_time_total" if session.tiny else "self_device_time_total"
    events = sorted(profiled.key_averages(), key=lambda e: -getattr(e, time))[:count]
    return [[event.key[:80], round(getattr(event, time) / 1e3, 3)] for event in events]


def optimizer_step(session: Session, name: OptimizerName, rank: int, method: str) -> dict[str, Any]:
    """G6: state of one decoder layer and time of a step, and the state of all 7B parameters by the same formula.

    Args:
        session: gives device and clock.
        name: of the optimizer.
        rank: of its subspace.
        method: its name in `core.memory_methods`.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    fields = LLAMA_7B | ({"hidden_size": 64, "intermediate_size": 176} if session.tiny else {})
    rank = min(rank, 16) if session.tiny else rank
    config = AutoConfig.for_model("llama", **{k: v for k, v in fields.items() if k != "model_type"})
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(session.device, session.dtype)
    optimizer = build_optimizer(layer, OptimConfig(optimizer=name, subspace=SubspaceConfig(rank=rank)))
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # makes the state; a subspace is refreshed here, not in the steps that are timed
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.numel() > 1]
    held = sum(t.numel() * t.element_size() for t in state)
    width = max(t.element_size() for t in state)
    sizes = [tuple(p.shape) for p in layer.parameters()]
    by_formula = _state_bytes(method, sizes, rank, width)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    everything = [(p.numel(),) if key in ends else tuple(p.shape) for key, p in whole.named_parameters()]
    parameters = sum(p.numel() for p in whole.parameters())
    timed = session.time([optimizer.step])
    return {
        **timed,
        "state_bytes_a_parameter": held / sum(p.numel() for p in layer.parameters()),
        "of_formula": held / by_formula,
        "state_gib_7b": _state_bytes(method, everything, rank, width) / 2**30,
        "parameters_7b": parameters,
    }


def _state_bytes(method: str, sizes: list[tuple[int, ...]], rank: int, width: int) -> float:
    matrices = [s for s in sizes if len(s) == 2]
    others = sum(s[0] for s in sizes if len(s) == 1)
    return method_bytes(method, matrices, others, rank, number_bytes=width).optimizer


def main() -> None:
    """All cases of this session."""
    options = arguments(__doc__.splitlines()[0], 540)
    session = Session("run3", options)
    session.case("ceilings", session.ceilings, needs_s=10)
    kinds = ("lit_reason", "lit_reason compiled", "transformers", "trl", "transformers compiled")
    for name, rank, method in (("adamw", 1, "full"), ("galore", 1024, "GaLore, Fira"), ("apollo", 256, "APOLLO")):
        work = lambda name=name, rank=rank, method=method: optimizer_step(session, name, rank, method)  # noqa: E731
        session.case(f"G6 {name}", work, needs_s=15)
    for name, config in MODELS.items():
        config = TINY if session.tiny else config
        for kind in kinds:
            if session.tiny and kind.endswith("compiled"):
                continue  # compiling takes minutes on a CPU
            work = lambda config=config, kind=kind: training_step(session, config, kind)  # noqa: E731
            session.case(f"G5 {name} {kind}", work, needs_s=40, peer=not kind.startswith("lit_reason"))
    session.cases["backends"] = backends_used()
    session.close()


if __name__ == "__main__":
    main()
