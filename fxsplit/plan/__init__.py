"""Graph to plan: where to cut, and which partitions train when. Pure functions over data; no torch."""
