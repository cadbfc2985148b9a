"""A model to a graph: building it, tracing it, and what its operations cost."""
