"""What the default model is measured on, and how (benchmarks/default_model.py)."""
