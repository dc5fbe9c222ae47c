"""Resume a run with another number of processes than the one that was interrupted."""

from __future__ import annotations

from typing import Any


def fit_progress(checkpoint: dict[str, Any], world: int) -> None:
    """Convert the batch counters of Lightning's training loop, which count the batches of one process.

    The loader converts its own place in the epoch (`data.loader.BinSampler.position`).

    Args:
        checkpoint: about to be restored; changed in place. Left alone when it says nothing of its processes.
        world: number of data-parallel processes now.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    states = loop.get("state_dict", {}).get("combined_loader", [])
    then = next((state["world"] for state in states if isinstance(state, dict) and "world" in state), world)
    if then == world:
        return
    progress = loop["epoch_loop.batch_progress"]
    for span, counts in ((span, progress[span]) for span in ("total", "current")):
        # The counters of one batch differ by where in it the checkpoint was saved: that difference stays.
        moved = -(-counts["processed"] * then // world) - counts["processed"]
        progress[span] = {name: count + moved for name, count in counts.items()}
