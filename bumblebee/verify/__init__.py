"""``bumblebee verify``: does training compute what it should on this machine, and how fast is the machine?

Run before an expensive run, with its launcher, precision and stage. See docs/verify.md. One noun a file:

    options  what the user chooses            finding  what a check came to            verification  all checks, in order
    attention, loss                           kernels against their formulas in fp64
    trial, plain                              a small real training run, and the same in plain torch
    gradient, curve, resume                   what trial runs must come to
    rates                                     measured speeds, which nothing is demanded of
    ranks, report                             how ranks tell each other, and what the user reads
"""
