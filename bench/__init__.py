"""Benchmarks: cases and contestants defined once, run on a CPU (`bench.cpu`) or a GPU (`bench.gpu`).

`cases` says what is computed, `contestants` and `peers` who computes it, `oracle` what is right, `measure` how
time and memory are taken, `results` how a run is stored and `report` how stored runs become tables and plots.
"""
