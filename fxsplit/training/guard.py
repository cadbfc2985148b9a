"""Watches training images that are held out, and undoes moves of the cut that cost accuracy on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxsplit.plan.schedule import Plan

# A fall counts when it is larger than so many of its standard errors.
ERRORS = 2.0


class Guard:
    """Compares, image by image, what was right before a move of the cut with what is right an epoch after it.

    The accuracy has fallen when more images became wrong than right, and by more than two standard errors of that
    difference, the root of how many changed (McNemar, 1947). Then the cut goes back to where it was, and stays there.

    Args:
        plan: whose moves are watched: those to a phase in which more partitions are settled.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._right: Tensor | None = None
        self._phase = -1
        self.last_phase = len(plan.phases) - 1

    def epoch_done(self, phase: int, right: Tensor) -> str:
        """Take up which held-out images are right after an epoch of `phase`: bool (N,), on the CPU.

        Returns a sentence if the cut is to go back to the phase before, which `last_phase` then is; else nothing.
        """
        before, self._right = self._right, right
        moved, self._phase = self._phase, phase
        phases = self._plan.phases
        if before is None or moved < 0 or phase <= moved or phases[phase].start <= phases[moved].start:
            return ""
        lost, gained = int((before & ~right).sum()), int((right & ~before).sum())
        if lost - gained <= ERRORS * math.sqrt(lost + gained):
            return ""
        self.last_phase = moved
        self._right = before
        was, now = (100 * float(each.float().mean()) for each in (before, right))
        name = self._plan.partitions[phases[phase].start].name
        return (
            f"with the cut before {name} the accuracy on held-out images fell from {was:.1f} % to {now:.1f} %: the cut "
            "goes back, and stays"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was right last, in which phase, and the last phase that may be entered."""
        right = None if self._right is None else self._right.to(torch.uint8)
        return {"right": right, "phase": self._phase, "last_phase": self.last_phase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._right = None if state["right"] is None else state["right"].bool()
        self._phase, self.last_phase = state["phase"], state["last_phase"]
