"""Stacks: one module a wire format, its requests in and its answers out; none knows HTTP or the model."""
