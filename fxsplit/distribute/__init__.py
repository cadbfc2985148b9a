"""Partitions over several devices and processes."""
