"""Serving: one reward model behind HTTP, in its own format and in those that trainers already speak.

    settings.py     what may be set, and the limits
    failures.py     refusals with their HTTP status
    turns.py        how templates write turns; patterns learned from a tokenizer, and of known families
    rendered.py     rendered text and token ids back to conversations
    exchange.py     what a stack's format gives to the scorer, and what it gets back
    stacks/         one module a stack: its requests in, its answers out
    batcher.py      rows of all requests meet here and go through the model together
    scoring.py      the reward model behind the batcher
    metrics.py      Prometheus
    guard.py        the key, the bounds on what is under way, one line for every error
    app.py          the routes
    server.py       sockets, warnings, start and stop

The way of a request: guard -> body, bounded -> (thread) JSON, the stack's format, conversations, token ids
-> batcher -> (model thread) features, heads -> the stack's answer. The event loop only moves bytes.
"""
