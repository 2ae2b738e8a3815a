"""``bumblebee preview``: what a recipe would do, without training. Writes nothing but the token cache.

preview             collects everything in a Preview; preview_report formats it
workload            what one step costs: micro-batches, FLOPs, memory
memory_estimate     memory by formula
dry_run             a few real steps in a subprocess (dry_run_process), to measure memory and time
parameter_counts, sample_text, sparkline    parts of the report
"""
