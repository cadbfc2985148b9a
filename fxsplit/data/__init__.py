"""Images and labels, in memory or in files, and the batches of an epoch."""
