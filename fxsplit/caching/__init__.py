"""What the settled partitions deliver, kept for later epochs, and the batches that a run takes from there."""
