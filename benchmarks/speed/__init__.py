"""What the benchmarks of speed share: models, a server of their own, fair turns."""
