"""Maps of a score over a reply, and what they are compared with (benchmarks/attribution.py)."""
