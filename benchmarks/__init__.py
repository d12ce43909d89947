"""What Steersman must reach, measured: `python -m benchmarks` prints one `name: value` row a figure.

Every benchmark is a module with a `run(context)` function; `registry.py` lists them. A full run writes dated JSON to
`benchmarks/results/` and makes the table there anew from all of its JSON files.
"""
