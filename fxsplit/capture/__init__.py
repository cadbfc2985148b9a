"""A model to a graph: one call of it recorded in each mode, and the answers that fixed its path."""
