"""The engines that fgsnap is measured beside, each in an environment of its own, installed from packages.

    environment    virtual environments below .peers/
    process        a contestant's processes: started, paused, weighed, ended
    contest        the two kinds of contestant: a server over HTTP, and a runner that has no server
    ours, llama_cpp, vllm_cpu                      engines that serve
    hugging_face, ctranslate2_cpu, onnx, openvino  engines that run in a process

A module of an engine has PINS and ``install``, ``prepare`` (files that it needs of a model, made once), and ``serve``
or ``run``, which say how a contestant is launched.
"""
