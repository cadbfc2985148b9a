"""A plan to numbers: data, stages, the executor, and training."""
