"""How each benchmark scores: one module each, arrays in, figures out."""
