"""What `tools/bench_ann.py` is made of."""
