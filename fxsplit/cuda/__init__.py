"""What only a GPU does: steps that are recorded as CUDA graphs and replayed."""
