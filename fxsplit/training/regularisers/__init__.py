"""What may be added to the loss, or done to weights beside the optimizer, so that a model generalises better."""
