"""Serving a snapshot.

A request's life, one module a line:

1  server      reads the HTTP request, watches its connection, and routes it
2  protocol    checks the body into a typed request, or answers 400 with the field at fault
3  text        renders the chat template and tokenizes
4  worker      carries it over one pipe into the engine's process
5  engine      step(): schedule, forward, sample, commit
6  scheduler   decides who runs, with how many tokens, in which KV blocks
7  decoder     runs the layers, touching tensors only through kernels.ops
8  text        turns tokens back into text, holding back half characters and stop strings
"""
