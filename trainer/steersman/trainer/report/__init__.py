"""The report of a run: one self-contained HTML page, `python -m steersman.trainer.report RUN_DIR [-o FILE]`.

load.py    a run folder or a pipeline folder, as plain data      panels.py  which metrics make which plot
plots.py   inline SVG                                            page.py    data and plots into the template
"""
