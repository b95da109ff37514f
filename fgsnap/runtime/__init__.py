"""Serving a snapshot.

A request's life, one module a line:

1  server      takes the HTTP request from its connection (connections), watches it, and routes it
2  protocol    checks the body into a typed request, or answers 400 with the field at fault
3  text        renders the chat template and tokenizes
4  link        carries it over one pipe into the engine's process, where worker takes it in
5  engine      step(): schedule, forward, sample, commit
6  scheduler   decides who runs, with how many tokens, in which KV blocks
7  decoder     runs the layers, touching tensors only through kernels.ops
8  answers     makes OpenAI's bodies of the tokens, which text has turned back into text without half a character

What runs around it: launch starts two processes, process is the engine's as its parent holds it, service is the HTTP
side from readiness to the last answer, and startup and metrics tell what happened.

Without HTTP: pipeline is the Python API, over an engine that is shared by whoever waits; generate is run and chat.
"""
