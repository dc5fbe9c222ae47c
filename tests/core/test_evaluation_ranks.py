"""Evaluation by two real processes: replicated weights with split work, sharded weights in step."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import pickle, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from rigged_model import as_lm, ids_of, random_llama, word_tokenizer
from lit_reason.core.evaluation import EvalPrompt, evaluate
from lit_reason.rewards.checkers import get_checker
from lit_reason.rollout.config import SamplingConfig

port, rank, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
prompts = [EvalPrompt(ids_of(p), p, p, "5") for p in ("a b c", "q", "r so", "q 4", "b")]
sampling = SamplingConfig(max_new_tokens=10, temperature=1.5, samples=2, batch_size=3)

def run(model, ranks):
    return evaluate(as_lm(model), word_tokenizer(), prompts, sampling, get_checker("numeric"), (1, 2),
                    stop_ids=(1,), progress=False, ranks=ranks)

results = {"alone": run(random_llama(), "same")}
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
results["split"] = run(random_llama(), "split")
sharded = random_llama()
for layer in sharded.model.layers:
    fully_shard(layer)
fully_shard(sharded)
results["sharded"] = run(sharded, "same")
results["sharded again"] = run(sharded, "same")
pickle.dump(results, open(out, "wb"))
dist.destroy_process_group()
"""


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = Path(__file__).parents[1]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(port), str(rank), str(tmp_path / f"{rank}")],
            cwd=here,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [child.communicate(timeout=240)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    both = [pickle.loads((tmp_path / f"{rank}").read_bytes()) for rank in range(2)]
    alone = both[0]["alone"]
    assert len({r.completion for r in alone.records}) > 5
    for results in both:
        for way in ("split", "sharded", "sharded again"):
            assert results[way] == alone, way
