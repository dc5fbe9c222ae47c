"""When low-rank training restarts: one rule, for the callback that restarts and the schedule that recovers from it."""

from __future__ import annotations


def is_restart(step: int, total_steps: int, warmup_steps: int, period_steps: int, recovery_steps: int) -> bool:
    """Whether a restart follows the optimizer step that makes `step` steps in all.

    Every multiple of the period, but not during warm-up, and not where the run ends before the restart can pay: fewer
    than half a period or twice the recovery is left.

    Args:
        step: optimizer steps made, from 0.
        total_steps: length of the run.
        warmup_steps: length of the warm-up.
        period_steps: steps from one restart to the next, at least 1.
        recovery_steps: steps over which the learning rate comes back after a restart.
    """
    if step == 0 or step % period_steps or step < warmup_steps:
        return False
    return total_steps - step >= max(2 * recovery_steps, period_steps / 2)


def last_restart(
    step: int, total_steps: int, warmup_steps: int, period_steps: int, recovery_steps: int
) -> int | None:
    """The step of the latest restart up to `step`, or None before the first one.

    Args:
        step: optimizer steps made, from 0.
        total_steps: as in `is_restart`.
        warmup_steps: as in `is_restart`.
        period_steps: as in `is_restart`.
        recovery_steps: as in `is_restart`.
    """
    for candidate in range(step - step % period_steps, 0, -period_steps):
        if is_restart(candidate, total_steps, warmup_steps, period_steps, recovery_steps):
            return candidate
    return None
