"""Models and trainer state on disk: loaded and built, written whole or not at all, resumed exactly; never
pickled.
"""
