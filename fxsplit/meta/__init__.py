"""Single operations on tensors without numbers: what they deliver, and what they cost."""
