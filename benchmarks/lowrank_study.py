"""Low-rank pretraining methods on real text, the learning rate swept for each: a study that goes on where it was.

python -m benchmarks.lowrank_study --train corpus.jsonl.xz --val valid.jsonl --out runs/lowrank [--arms full lowrank]

On a GPU, as far as four hours go (not run yet): `--recipe pretrain/llama-60m-full --rank 128 --period 200 --recovery 10
--steps 3000 --batch_tokens 32768 --arms full lowrank lowrank+both fira --seeds 1 --minutes 240`.

Each arm's rate is swept by factors of two on the first seed until the best one stands between worse ones;
then the other seeds train with it. Every finished run is a line of OUT/runs.jsonl and is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import record

LORO = ["--model.optim.optimizer=loro", "--model.optim.schedule=jagged_cosine"]
SETTINGS = ("recipe", "rank", "period", "recovery", "steps", "batch_tokens")
JUMP = ("restart/loss_after", "restart/loss_before")
BASE = "lowrank"  # the arm that differences are taken from
OWN_RATE = ["--model.optim.hidden_lr=0.25"]  # of the hidden matrices: the share that GaLore's scale gives them


def arms(rank: int, period: int, recovery: int) -> dict[str, tuple[float, list[str]]]:
    """The first rate to try, and the options of each arm, the most telling arms first.

    Args:
        rank: of factors and subspaces; the scale of the factors is 1.
        period: steps between restarts, changes of subspace, exact steps.
        recovery: steps over which the rate comes back.
    """
    factors = [f"--model.lm.lowrank.rank={rank}", f"--model.lm.lowrank.alpha={rank}"]
    sparse = [*factors, "--model.lm.lowrank.sparse_density=0.03"]
    subspace = [f"--model.optim.subspace.rank={rank}", f"--model.optim.subspace.refresh_steps={period}"]
    cycle = [f"--model.optim.period_steps={period}", f"--model.optim.recovery_steps={recovery}"]
    both = [*cycle, "--model.optim.schedule=cosine_quick_recovery", "--trainer.callbacks+=Restart"]
    return {
        "full": (2e-3, []),
        "lowrank": (2e-3, factors),
        "lowrank+both": (2e-3, [*factors, *both]),
        "galore": (5e-3, ["--model.optim.optimizer=galore", *subspace]),
        "fira": (5e-3, ["--model.optim.optimizer=fira", *subspace]),
        "lowrank+refactorize": (2e-3, [*factors, *both, "--trainer.callbacks.reset=none"]),
        "lowrank+reset": (2e-3, [*factors, *both, "--trainer.callbacks.refactorize=false"]),
        "sltrain": (2e-3, sparse),
        "sltrain+both": (2e-3, [*sparse, *both]),
        "apollo_mini": (5e-3, ["--model.optim.optimizer=apollo_mini", *subspace]),
        "loro": (5e-3, [*factors, *subspace, *cycle, *LORO]),
        "full+own_rate": (5e-3, OWN_RATE),
        "lowrank+own_rate": (5e-3, [*factors, *OWN_RATE]),
        "lowrank+both+own_rate": (5e-3, [*factors, *both, *OWN_RATE]),
    }


ARMS = list(arms(1, 1, 1))


def train(options: list[str], result: Path) -> None:
    """One run, in a process of its own; its figures become a file."""
    from lit_reason.cli.reason_cli import build
    from lit_reason.core.metrics_log import read_metrics
    from lit_reason.core.run_folder import run_folder

    cli = build("fit", options)
    cpu, wall = time.process_time(), time.perf_counter()
    cli.run_verb()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    lm, optimizer = cli.model.lm, cli.trainer.optimizers[0]
    held = [v for state in optimizer.state.values() for v in state.values() if hasattr(v, "element_size") and v.ndim]
    restarts = [value for _, value in log.points("restart/seconds")]
    figures = {
        "perplexity": log.last("val/perplexity"),
        "bits_per_byte": log.last("val/bits_per_byte"),
        "parameters": sum(p.numel() for p in lm.parameters()),
        "weight_bytes": size(lm.parameters()),
        "gradient_bytes": size(p for p in lm.parameters() if p.requires_grad),
        "optimizer_bytes": size(held),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cpu_seconds": cpu,  # of training and the validation behind it
        "seconds": wall,
        "restart_seconds": sum(restarts),
        "restarts": len(restarts),
        "loss_jumps": [a - b for (_, a), (_, b) in zip(*map(log.points, JUMP), strict=True)],
        "balance_defects": [value for _, value in log.points("restart/balance_defect")],
        "stable_ranks": [value for _, value in log.points("restart/stable_rank")],
    }
    result.write_text(json.dumps(figures))


def size(tensors: Iterable[Any]) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Study:
    """Runs by (arm, rate, seed), each made once.

    Args:
        arms: as `arms` gives them.
        common: options of every run.
        out: folder of the study.
        stop_at: no run begins after this time, in seconds since the epoch.
    """

    def __init__(self, arms: dict[str, tuple[float, list[str]]], common: list[str], out: Path, stop_at: float) -> None:
        self.arms, self.common, self.out, self.stop_at = arms, common, out, stop_at
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "runs.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {(r["arm"], r["lr"], r["seed"]): r for r in map(json.loads, lines)}

    def run(self, arm: str, lr: float, seed: int) -> float:
        """Perplexity of one run; a failed or diverged one counts as infinite.

        Raises:
            TimeoutError: there is no time left to begin it.
        """
        if (arm, lr, seed) not in self.done:
            if time.time() > self.stop_at:
                raise TimeoutError
            self._train(arm, lr, seed)
        value = self.done[arm, lr, seed].get("perplexity")
        return math.inf if value is None or not math.isfinite(value) else value

    def _train(self, arm: str, lr: float, seed: int) -> None:
        result = self.out / "latest.json"
        result.unlink(missing_ok=True)
        own = [f"--model.optim.lr={lr}", f"--seed_everything={seed}", f"--data.seed={seed}"]
        options = [*self.common, *self.arms[arm][1], *own]
        child = multiprocessing.get_context("fork").Process(target=train, args=(options, result))
        child.start()
        child.join()
        figures = json.loads(result.read_text()) if result.exists() else {"failed": child.exitcode}
        line = {"arm": arm, "lr": lr, "seed": seed, **figures}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.done[arm, lr, seed] = line
        print(f"{arm:20} lr {lr:<8g} seed {seed}  perplexity {figures.get('perplexity')}", flush=True)

    def best_rate(self, arm: str, first_seed: int) -> float:
        """Sweep by factors of two until the best rate stands between two worse ones."""
        best = self.arms[arm][0]
        for factor in (0.5, 2.0):  # one valley is assumed: where the rate below is better, the one above is not tried
            start = best
            while self.run(arm, best * factor, first_seed) < self.run(arm, best, first_seed):
                best *= factor
            if best != start:
                break
        return best


def table(study: Study) -> dict[str, Any]:
    """Each arm at the best rate of the sweep: perplexity there, and over the other seeds.

    The seed of the sweep chose the rate, so intervals are taken over the others alone. The difference to `lowrank` is
    taken seed by seed, since equal seeds share the order of the data.
    """
    rows: dict[str, Any] = {}
    for arm in ARMS:
        swept = {r["lr"]: r for (a, _, seed), r in study.done.items() if a == arm and seed == 0 and r.get("perplexity")}
        if not swept:
            continue
        lr = min(swept, key=lambda rate: swept[rate]["perplexity"])
        runs = [r for (a, rate, seed), r in study.done.items() if (a, rate) == (arm, lr) and seed and r["perplexity"]]
        rows[arm] = {
            "lr": lr,
            "sweep": {rate: swept[rate]["perplexity"] for rate in sorted(swept)},
            "bracketed": min(swept) < lr < max(swept),
            "logs": {r["seed"]: math.log(r["perplexity"]) for r in runs},
            **costs([swept[lr], *runs]),
        }
    for row in rows.values():
        base = {} if row is rows.get(BASE) else rows.get(BASE, {}).get("logs", {})
        values = list(row["logs"].values())
        row["perplexity"], row["interval"] = bounds(values, math.exp)
        paired = [value - base[seed] for seed, value in row["logs"].items() if seed in base]
        row["against_lowrank"], row["against_interval"] = bounds(paired, math.expm1)
    return rows


def costs(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Memory of an arm by kind, and means over its runs of CPU time and of the restarts' share of the time."""
    kinds = ("parameters", "weight_bytes", "optimizer_bytes", "gradient_bytes")
    shares = [run["restart_seconds"] / run["seconds"] for run in runs if run["restarts"]]
    return {
        **{kind: runs[0][kind] for kind in kinds},
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "cpu_seconds": statistics.fmean(run["cpu_seconds"] for run in runs),
        "restart_share": statistics.fmean(shares) if shares else 0.0,
    }


def bounds(logs: list[float], back: Callable[[float], float]) -> tuple[float | None, list[float] | None]:
    """Mean and 95 % interval of logarithms, brought back; None where there are too few."""
    if not logs:
        return None, None
    mean, half = interval(logs)
    return back(mean), None if half is None else [back(mean - half), back(mean + half)]


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of Student's 95 % interval; None for one value."""
    quantiles = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
    mean = statistics.fmean(values)
    if len(values) not in quantiles:
        return mean, None
    return mean, quantiles[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def lines(rows: dict[str, Any], tokens: int) -> Iterator[str]:
    """The table as Markdown.

    Args:
        rows: of `table`.
        tokens: trained in a run.
    """
    heads = ("arm", "rate", "seed 0", "other seeds", "95 %", "against low-rank", "95 %", "parameters, M")
    heads += ("weights", "+ optimizer", "+ gradients, MB", "tokens a CPU second", "restarts")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for arm, row in rows.items():
        held = list(itertools.accumulate(row[f"{kind}_bytes"] / 1e6 for kind in ("weight", "optimizer", "gradient")))
        cells = [
            arm,
            f"{row['lr']:g}" + ("" if row["bracketed"] else " (not bracketed)"),
            f"{row['sweep'][row['lr']]:.1f}",
            "-" if row["perplexity"] is None else f"{row['perplexity']:.1f} ({len(row['logs'])})",
            "-" if row["interval"] is None else "{:.1f} to {:.1f}".format(*row["interval"]),
            "-" if row["against_lowrank"] is None else f"{row['against_lowrank']:+.1%}",
            "-" if row["against_interval"] is None else "{:+.1%} to {:+.1%}".format(*row["against_interval"]),
            f"{row['parameters'] / 1e6:.2f}",
            *(f"{size:.2f}" for size in held),
            f"{tokens / row['cpu_seconds']:,.0f}",
            f"{row['restart_share']:.2%}" if row["restart_share"] else "-",
        ]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what the time allows, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, default=4, help="seeds an arm; the first is the sweep's")
    parser.add_argument("--recipe", default="pretrain/llama-1m-cpu", help="what all arms share")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--period", type=int, default=100)
    parser.add_argument("--recovery", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_tokens", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=120, help="no run begins later than this")
    parser.add_argument("--note", action="append", default=[], help="for the record")
    parser.add_argument(
        "--record", action="store_true", help="write what there is to benchmarks/results, train nothing"
    )
    given = parser.parse_args()
    common = [
        f"--config={given.recipe}",
        f"--data.train_file={given.train}",
        f"--data.val_file={given.val}",
        f"--data.cache_dir={given.out / 'cache'}",
        f"--data.batch_tokens={given.batch_tokens}",
        f"--trainer.max_steps={given.steps}",
        f"--trainer.val_check_interval={given.steps}",
        "--trainer.enable_progress_bar=false",
        f"--trainer.logger.save_dir={given.out}",
        "--trainer.callbacks=[]",
    ]
    study = Study(arms(given.rank, given.period, given.recovery), common, given.out, time.time() + 60 * given.minutes)
    if not given.record:
        import lit_reason.core.trainer  # noqa: F401  # so that each run, a fork, need not import again

        try:
            rates = {arm: study.best_rate(arm, 0) for arm in given.arms}
            for seed in range(1, given.seeds):
                for arm, lr in rates.items():
                    study.run(arm, lr, seed)
        except TimeoutError:
            print("out of time: the same command goes on")
    rows = table(study)
    print("\n".join(lines(rows, given.steps * given.batch_tokens)))
    if given.record:
        settings = {name: getattr(given, name) for name in SETTINGS}
        command = f"python -m benchmarks.lowrank_study --train {given.train.name} --val {given.val.name} --out OUT"
        command += "".join(f" --{name} {value}" for name, value in settings.items())
        found = {"settings": settings, "arms": rows, "runs": list(study.done.values())}
        print(record("lowrank-study", found, given.note, command))


if __name__ == "__main__":
    main()
