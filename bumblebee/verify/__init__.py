"""``bumblebee verify``: check that training computes what it should on this machine, and measure how fast the machine is.

Run it before an expensive run, with that run's launcher, precision and ZeRO stage. See docs/verify.md.

    verify_options, context     the user's options; device, dtype and folder that follow from them
    subject                     the model and data of the recipe that follows
    small_model                 a small model with the options of a large one, and reference_model, the same as formulas
    reference_data              a recipe's batches, recomputed in plain Python
    checks/                     one check per file; tolerances and the machine's throughput
    check, check_result         the list of checks in their order; measurements with their bounds
    training_run                a small real training run, and reference_loop, the same in plain PyTorch
    known_gradients             the same run with gradients that no precision rounds
    verification                runs all checks on all ranks, prints verify_report, writes verify.json
    rank_messages, watchdog     exchange of results between ranks; ends ranks that are stuck in a collective
"""
