"""What `benchmarks/transport.py` measures, and what with."""
