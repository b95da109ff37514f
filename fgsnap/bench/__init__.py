"""``fgsnap bench``: what this machine does with a snapshot, and what any OpenAI-compatible endpoint does under load.

    startup            exec to the first token over HTTP, with the server's own account of where the time went
    local              the engine in this process: first token, prefill and decode, without HTTP
    workload           prompts of an exact length, and lengths drawn as in DeepSpeed-FastGen's benchmark
    client             one streamed completion over HTTP: bytes stamped as they come, read afterwards
    load               closed-loop clients, level by level
    sla                which answers came fast enough, and the effective throughput that they make
    server             a ``fgsnap serve`` that a benchmark starts for itself
    target             what is measured under load: an endpoint that is there, or a server of our own
    record, show, plot how results are summarised and kept, printed, and drawn
    command            the command line

Nothing here is imported by the commands that serve.
"""
