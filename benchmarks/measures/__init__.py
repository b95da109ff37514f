"""What is measured of the engines: one module a part of ``peers.py``.

models    the two models in every format that an engine reads, from the same bfloat16 weights
machine   what the host itself can do: memory bandwidth, bfloat16 rate
startup   exec to the first token
speed     decode and prefill, in paired rounds
curve     closed-loop clients: throughput, latency, effective throughput
memory    what is resident while serving
loading   mapping a file and touching its pages, warm and cold
verdict   the ratios that were promised, and which are met
"""
