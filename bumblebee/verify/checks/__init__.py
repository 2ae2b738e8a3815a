"""The checks: each `run(context)` takes a resolved context on every rank and returns a `CheckResult`."""
