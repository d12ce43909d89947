"""The demo's little world: a language, and an annotator whose rule nothing in training may see."""
