"""Table 1 of Bhyravabhottla and Lee, as they print it: to be shown beside figures of our own, as theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MEGA, GIGA = 10**6, 10**9


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A row of their table: accuracy in per cent, seconds of training, and memory as they read it, at the end."""

    method: str
    accuracy_pct: float
    seconds: float
    memory_bytes: float


# By the name that their networks have here.
PAPER: Mapping[str, tuple[PaperRow, ...]] = {
    "paper:cnn": (
        PaperRow("layer-to-layer training", 80.0, 309.1986117362976, 8862.59765625 * MEGA),
        PaperRow("standard training", 78.0, 72.70218634605408, 5277.4296875 * MEGA),
    ),
    "paper:vgg16": (
        PaperRow("layer-to-layer training", 10.0, 2311.3207755088806, 6035.421875 * MEGA),
        PaperRow("standard training", 9.62, 265.588809967041, 5436.65234375 * MEGA),
    ),
    "paper:densenet": (
        PaperRow("layer-to-layer training", 63.98, 68081.966414779316, 7.77 * GIGA),
        PaperRow("standard training", 60.25, 36045.163185596466, 5.2 * GIGA),
    ),
    "paper:resnext": (
        PaperRow("layer-to-layer training", 56.85, 8790.185438156128, 6.9 * GIGA),
        PaperRow("standard training", 55.28, 3930.0629668235779, 5.5 * GIGA),
    ),
}
ABOUT = (
    "Theirs, and not measured here: Table 1 of K. K. A. Bhyravabhottla and W. Lee, Comparison between layer-to-layer "
    "network training and conventional network training using Deep Convolutional Neural Networks. One run of each, "
    "without a spread; in the code that they released, layer-to-layer training has six times the epochs of standard "
    "training; memory is that of the process, read once at the end."
)
