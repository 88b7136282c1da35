"""VBench: run under its own interpreter, its result files, its published totals. It is never imported here.

`driver.py` is the only file that runs beside VBench, started by path; the others see nothing but JSON files.
"""
