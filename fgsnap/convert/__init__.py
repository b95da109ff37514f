"""Conversion: a checkpoint becomes a snapshot, once and offline.

A *source* lists a checkpoint's tensors and reads their rows; a *family* says, as pure data, what the model computes and
which source tensor is which logical tensor; the *pipeline* asks for one slab of output after another and writes it.
Only this package knows model families, and the runtime never imports it. ``export`` runs the same maps backwards.
Nothing in a checkpoint is ever executed: it is numbers, JSON and text.
"""
