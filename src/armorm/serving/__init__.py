"""HTTP server for one reward model, in armorm's own format and in those of trainers and inference servers.

A request passes middleware -> app -> (reader thread) JSON, protocol, conversations, token ids -> batcher -> (model
thread) features, heads -> protocol. The event loop only moves bytes.
"""
