"""A graph and its partitions to an nn.Module: stages, and the executor that runs any phase of a plan."""
