"""How a slot goes from one shard to another: the steps, as changes of two rows of the slot map.

Pure: a step is computed from what the source's and the target's rows say, and is taken by setting
one of them if it is still what it was. All that a move is, is in these two rows, so anybody can go
on with it, or end it, at any time. Nothing here depends on a clock, and no lock is held from one
step to the next.

::

    source   owned ── mark ── fence ──> draining ── release ──> released ──> elsewhere
                ^                          │
                └───────── reopen ─────────┘
    target   elsewhere ── claim ──> importing ── decide ──> owned
                                        └────── cancel ───> cancelled ──> elsewhere

Only ``owned`` and ``draining`` claim the slot, and only ``owned`` serves it. The target's commit of
``decide`` is the move.

Three rules make it safe whoever else is at it:

- Who wants to change anything first sets the source's mark (``move_id``) to one of his own, once,
  and a mark claims the target once at most. So of several, all but the last have lost their mark.
- Whoever has claimed the target looks at the source again (the fence and the barrier do) before he
  decides. So a claim that came after somebody else's cancelling never decides.
- An abort cancels on the target before it reopens the source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from uuid import NAMESPACE_OID, uuid5

OWNED, DRAINING, RELEASED = "owned", "draining", "released"
IMPORTING, CANCELLED, ELSEWHERE = "importing", "cancelled", "elsewhere"
"""A slot's states in a shard's record. Owned or draining are claims; elsewhere is a hint; the
others tell of rows of the slot's that are stored here and not served."""
CLAIMING = (OWNED, DRAINING)
_UNDECIDED = (IMPORTING, CANCELLED)


@dataclass(frozen=True, slots=True)
class SlotRow:
    """What a shard's record says about one slot.

    ``owner`` is a shard's UUID; of an importing or a cancelled row its own. ``move_id`` is the mark
    of who is at it, and ``peer`` the UUID of the other shard of a move.
    """

    slot: int
    owner: str
    state: str
    epoch: int
    move_id: str | None = None
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """The two rows of a move. The source's must have been read first: see ``is_decided``."""

    source_uuid: str
    target_uuid: str
    source: SlotRow
    target: SlotRow

    @property
    def is_served(self) -> bool:
        """Whether the source serves the slot."""
        return self.source.owner == self.source_uuid and self.source.state == OWNED

    @property
    def is_fenced(self) -> bool:
        """Whether the source serves the slot no more, because of a move to this target."""
        frozen = self.source.state in (DRAINING, RELEASED)
        return frozen and self.source.peer == self.target_uuid

    @property
    def is_decided(self) -> bool:
        """Whether the slot is the target's, or was and has gone on from there.

        A target that has not decided since the fence is either behind it, or importing, or has
        cancelled that. Its epoch may be higher than the fence's if somebody has claimed it anew,
        and then it says from whom. A released source whose target has not decided was released by
        a decision that the target has lost again; somebody may have claimed that since.
        """
        if not self.is_fenced:
            return False
        behind, fence = self.target.epoch < self.source.epoch, self.source.epoch
        undecided = self.target.state in _UNDECIDED
        anew = self.target.peer == self.source_uuid
        hinted = self.target.state == ELSEWHERE and self.target.owner == self.source_uuid
        return not (behind or (undecided and (self.target.epoch == fence or anew)) or hinted)

    @property
    def is_undone(self) -> bool:
        """Whether nothing is left at the target of a claim, but rows that may go.

        The source must have come up to its epoch: who forgets it hints at the source with that.
        """
        above = self.target.epoch > self.source.epoch
        left = self.target.state == IMPORTING or (self.target.state == CANCELLED and above)
        return self.is_served and not left

    @property
    def top(self) -> int:
        """The higher of the two epochs."""
        return max(self.source.epoch, self.target.epoch)


def mark(pair: Pair, move_id: str) -> SlotRow:
    """The source with this mark; one that was released without a decision drains again."""
    state = OWNED if pair.source.state == OWNED else DRAINING
    return replace(
        pair.source, state=state, owner=pair.source_uuid, move_id=move_id, peer=pair.target_uuid
    )


def claim(pair: Pair, move_id: str) -> SlotRow:
    """The target about to import; what it has of the slot already is a beginning."""
    return SlotRow(
        pair.target.slot, pair.target_uuid, IMPORTING, pair.top + 1, move_id, pair.source_uuid
    )


def fence(pair: Pair) -> SlotRow:
    """The source without service, at the epoch of the claim."""
    return replace(pair.source, state=DRAINING, epoch=pair.target.epoch)


def decide(target: SlotRow) -> SlotRow:
    """The target as the slot's owner."""
    return SlotRow(target.slot, target.owner, OWNED, target.epoch)


def release(pair: Pair) -> SlotRow:
    """The source once the target has decided: its rows stay for a while, unseen.

    It tells what the target tells of the owner; unless that is about to get the slot back from
    somebody, which tells nothing new.
    """
    told = pair.source if pair.target.state in _UNDECIDED else pair.target
    owner = pair.target_uuid if told is pair.source else told.owner
    return replace(pair.source, state=RELEASED, owner=owner, epoch=told.epoch)


def cancel(pair: Pair, move_id: str) -> SlotRow:
    """The target without a claim that could still decide."""
    return SlotRow(
        pair.target.slot, pair.target_uuid, CANCELLED, pair.top, move_id, pair.source_uuid
    )


def reopen(pair: Pair) -> SlotRow:
    """The source in service again, once the target has cancelled.

    In any case at an epoch that no hint of the target's goes beyond, see ``forget``: else the slot
    could get to a third shard at a lower one than that.
    """
    epoch = pair.top if pair.source.state == OWNED else pair.top + 1
    return SlotRow(pair.source.slot, pair.source_uuid, OWNED, epoch)


def forget(row: SlotRow, source_uuid: str) -> SlotRow:
    """A released or cancelled row when nothing is stored of the slot any more: a hint."""
    owner = row.owner if row.state == RELEASED else source_uuid
    return SlotRow(row.slot, owner, ELSEWHERE, row.epoch)


class Act(Enum):
    """What is to be done next."""

    MARK = "mark"
    CLAIM = "claim"
    COPY = "copy"
    FENCE = "fence"
    BARRIER = "barrier"
    DECIDE = "decide"
    RELEASE = "release"
    CANCEL = "cancel"
    REOPEN = "reopen"
    DONE = "done"
    """The slot is the target's, or was; or, when ending a move, there is none any more."""
    LOST = "lost"
    """Somebody else is at it, or the slot is not the source's."""


@dataclass(slots=True)
class Progress:
    """What one who moves a slot remembers: all of it is lost with him, and nothing depends on it.

    ``asked``: he was told to set his mark. ``marked``: the source has had it. ``claimed``: his mark
    has claimed the target. ``copied``: the target was level with the source, and verified.
    ``passed``: the barrier was passed after the claim.
    """

    move_id: str
    asked: bool = False
    marked: bool = False
    claimed: bool = False
    copied: bool = False
    passed: bool = False

    def see(self, pair: Pair) -> None:
        """Remember the mark and the claim where they are seen: the answers may have been lost."""
        self.marked |= pair.source.move_id == self.move_id
        claimed = pair.target.state == IMPORTING and pair.target.move_id == self.move_id
        self.claimed |= claimed

    def ask(self) -> Act:
        """Set the mark, with another one each time: what became of the last request is not known.

        If a mark were set twice, the source's row would be once more what it was the first time,
        and requests that were made then, and arrive late, would count.
        """
        if self.marked:
            return Act.LOST
        if self.asked:
            self.move_id = str(uuid5(NAMESPACE_OID, self.move_id))
        self.asked = True
        return Act.MARK


def next_act(pair: Pair, mine: Progress) -> Act:
    """What he who moves the slot does next; he remembers what he sees, and may get a new mark."""
    mine.see(pair)
    if pair.is_decided:
        return Act.DONE if pair.source.state == RELEASED else Act.RELEASE
    if pair.target.state in CLAIMING or not (pair.is_served or pair.is_fenced):
        return Act.LOST
    if pair.source.move_id != mine.move_id:
        return mine.ask()
    if pair.target.state != IMPORTING or pair.target.move_id != mine.move_id:
        return Act.LOST if mine.claimed else Act.CLAIM
    if not mine.copied:
        return Act.COPY
    if pair.source.state == OWNED:
        return Act.FENCE
    return Act.DECIDE if mine.passed else Act.BARRIER


def next_act_of_abort(pair: Pair, mine: Progress) -> Act:
    """What he who ends the move does next: a decided one is finished, any other undone.

    He remembers what he sees, and may get a new mark.
    """
    mine.see(pair)
    if pair.is_decided:
        return Act.DONE if pair.source.state == RELEASED else Act.RELEASE
    if pair.is_undone and pair.source.move_id is None:
        return Act.DONE
    if pair.target.state in CLAIMING or not (pair.is_served or pair.is_fenced):
        return Act.LOST
    if pair.source.move_id != mine.move_id:
        return mine.ask()
    cancelled = pair.target.state == CANCELLED and pair.target.move_id == mine.move_id
    return Act.REOPEN if cancelled else Act.CANCEL
