"""Settled partitions made cheap: folded, fused, kept on the host."""
