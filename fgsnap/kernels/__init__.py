"""The ops a decoder is made of (``ops.py``), and the backends that implement them."""
