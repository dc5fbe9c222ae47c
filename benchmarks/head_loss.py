"""C2: loss and gradients of a language-model head, ours against materialised logits.

2,048 tokens, width 576, vocabulary 49,152 (the shape of SmolLM2-135M), 35 % of the tokens trained, float32 on a CPU.
Each measurement runs in a process of its own, for its peak memory; rounds alternate between the cases.

    python -m benchmarks.head_loss [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from tqdm import tqdm

from benchmarks.record import record, spread

TOKENS, WIDTH, VOCABULARY, TRAINED = 2048, 576, 49152, 0.35
CASES = {
    "materialised, all tokens": "cross entropy over logits of every token, untrained ones ignored",
    "materialised, trained tokens": "cross entropy over logits of the selected tokens",
    "torch linear_cross_entropy": "torch's own op with its default chunking options, selected tokens",
    "lit_reason": "linear_token_loss on the selected tokens",
}


def run_case(case: str, threads: int) -> dict[str, float]:
    """Forward and backward once, in this process.

    Returns:
        CPU seconds, and the rise of the peak resident memory in MiB.
    """
    import torch
    from torch.nn import functional as F

    from lit_reason.kernels.head_loss import linear_token_loss

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(VOCABULARY, WIDTH, generator=generator)).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    trained = torch.rand(TOKENS, generator=generator) < TRAINED
    index = trained.nonzero()[:, 0]
    torch.mm(hidden[:64].detach(), hidden[:64].detach().t())  # start the thread pool before the clock
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if case == "materialised, all tokens":
        ignored = torch.where(trained, targets, -100)
        loss = F.cross_entropy(F.linear(hidden, weight), ignored, reduction="sum")
    elif case == "materialised, trained tokens":
        loss = F.cross_entropy(F.linear(hidden[index], weight), targets[index], reduction="sum")
    elif case == "torch linear_cross_entropy":
        if not hasattr(F, "linear_cross_entropy"):
            raise SystemExit("this torch has no linear_cross_entropy")
        chunked = torch.nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(hidden[index], weight, targets[index], reduction="sum", options=chunked)
    else:
        loss = linear_token_loss(hidden[index], weight, targets[index], torch.ones(len(index))).loss_sum
    loss.backward()
    seconds = time.process_time() - start
    return {"cpu_s": seconds, "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main() -> None:
    """Measure all cases in alternating rounds, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, options.threads)))
        return
    seen: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for turn in tqdm(range(options.rounds), desc="rounds"):
        for case in list(CASES)[:: 1 if turn % 2 == 0 else -1]:
            command = [sys.executable, "-m", "benchmarks.head_loss", "--case", case, "--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                tqdm.write(f"{case}: {done.stderr.strip().splitlines()[-1]}")
            else:
                seen[case].append(json.loads(done.stdout))
    base = seen["materialised, all tokens"]
    result = {}
    print(f"{'case':32} {'CPU s':>18} {'ratio':>18} {'MiB':>8} {'ratio':>6}")
    for case, runs in seen.items():
        if not runs:
            continue
        time_ratio = spread([a["cpu_s"] / b["cpu_s"] for a, b in zip(runs, base, strict=False)])
        memory_ratio = spread([a["peak_mib"] / b["peak_mib"] for a, b in zip(runs, base, strict=False)])
        cpu, mib = spread([r["cpu_s"] for r in runs]), spread([r["peak_mib"] for r in runs])
        result[case] = {"cpu_s": cpu, "time_ratio": time_ratio, "peak_mib": mib, "memory_ratio": memory_ratio}
        shown = [f"{s['median']:.2f} ({s['min']:.2f}-{s['max']:.2f})" for s in (cpu, time_ratio)]
        print(f"{case:32} {shown[0]:>18} {shown[1]:>18} {mib['median']:8.0f} {memory_ratio['median']:6.2f}")
    print(record("head_loss", {"what": CASES, "threads": options.threads, "cases": result}))


if __name__ == "__main__":
    main()
