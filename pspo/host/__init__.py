"""What the machine and the cluster say: the environment, signals, memory, SLURM, the hub."""
