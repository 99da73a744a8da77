"""HTTP server for one reward model, in armorm's own format and in those of trainers and inference servers.

    settings.py      options and limits
    protocols/       wire formats, one module each
    app.py           routes and /openapi.json
    middleware.py    API key, limits on requests and bodies, metrics of requests
    engine.py        requests of any protocol in, response bodies out
    batcher.py       rows of all requests, batched for the model
    prefix_cache.py  forward passes that compute a shared prompt once
    metrics.py       Prometheus metrics
    errors.py        errors with their HTTP status
    server.py        sockets, start and stop
    ray_serve.py     replicas behind Ray Serve
    playground/      web page

A request passes middleware -> app -> (reader thread) JSON, protocol, conversations, token ids -> batcher -> (model
thread) features, heads -> protocol. The event loop only moves bytes.
"""
