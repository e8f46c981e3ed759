"""The journal and its projections; SQL is written here and nowhere else."""
