"""Groups without spread make room for other tasks; a round in which everything failed is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from lit_reason.core.ranks import from_all_ranks
from lit_reason.errors import UserError
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory

MOST_REASONS = 3  # told apart in an error


@dataclasses.dataclass
class Resampled:
    """A round's rollouts, and what it took to get them.

    Attributes:
        rollouts: group after group.
        replaced: groups that others stand in place of.
        attempts: how often tasks were played, on all processes alike.
        dropped: rollouts that were played and are not among them.
    """

    rollouts: list[Trajectory]
    replaced: int = 0
    attempts: int = 1
    dropped: list[Trajectory] = dataclasses.field(default_factory=list)


def with_spread(
    rollouts: Sequence[Trajectory], size: int, most: int, play: Callable[[list[int], int], Sequence[Trajectory]]
) -> Resampled:
    """Replace groups without spread by those of other tasks. All processes must call this together.

    An attempt in which all rollouts of a group fail is one, and leaves the group in hand where it is.

    Args:
        rollouts: of this process, group after group.
        size: rollouts of a group.
        most: attempts at most, beyond the first.
        play: plays other tasks in place of these groups, in an attempt of this number; called on every process when
            one must, for passes over sharded weights are in step, and perhaps without groups.
    """
    found = Resampled(list(rollouts))
    for attempt in range(1, most + 1):
        groups = [slice(i, i + size) for i in range(0, len(rollouts), size)]
        dead = [i for i, at in enumerate(groups) if without_spread(found.rollouts[at])]
        if not max(from_all_ranks(len(dead))):
            break
        fresh, found.attempts = play(dead, attempt), attempt + 1
        for i, at in zip(dead, groups, strict=False):
            group, own = fresh[at], groups[i]
            if all(t.failure for t in group):
                found.dropped += group
                continue
            found.dropped += found.rollouts[own]
            found.rollouts[own] = [dataclasses.replace(t, prompt=i) for t in group]
            found.replaced += 1
    return found


def without_spread(group: Sequence[Trajectory]) -> bool:
    """Whether all sound rollouts of a group earned the same, turn by turn, so that comparing them teaches nothing.

    Args:
        group: rollouts of one task.
    """
    earned = {(*t.turn_rewards, None, t.outcome, None, *t.token_rewards) for t in group if not t.failure}
    return len(earned) < 2


def untrained(t: Trajectory) -> Trajectory:
    """A rollout that could not begin, as one of two tokens to run passes over; it stays failed and trains nothing.

    Args:
        t: the rollout, without tokens.
    """
    marks = [NOT_SAMPLED, 0]
    return dataclasses.replace(t, ids=[0, 0], turn_id=marks, logprob=[0.0, 0.0], turn_terms=[{}], stops=["length"])


def refuse_without_rollouts(played: Sequence[Trajectory], attempts: int = 1) -> None:
    """Stop where every rollout failed, on all processes. All processes must call this together.

    Args:
        played: rollouts of this process, of all attempts.
        attempts: how often tasks were played.

    Raises:
        UserError: none is left; the message says how many failed, and why.
    """
    if any(from_all_ranks(any(not t.failure for t in played))):
        return
    failures = [failure for part in from_all_ranks([t.failure for t in played]) for failure in part]
    reasons = Counter(failures).most_common()
    said = [f"{count} times {reason}" for reason, count in reasons[:MOST_REASONS]]
    if len(reasons) > MOST_REASONS:
        said.append(f"{len(reasons) - MOST_REASONS} other reasons")
    tried = f", in {attempts} attempts (policy.resample is {attempts - 1})" if attempts > 1 else ""
    raise UserError(f"all {len(failures)} rollouts of the round failed{tried}: {'; '.join(said)}")
