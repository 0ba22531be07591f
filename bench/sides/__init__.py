"""What the benchmarks measure: each side of each comparison, and the bytes and FLOP of its work."""
