"""Random chaos: people at work, a monkey that breaks things, and a plain model of what must come of it.

    make chaos                                  five minutes; prints its seed
    make chaos CHAOS_SECONDS=600 CHAOS_SEED=7   the same decisions again

Each actor draws from random numbers of its own, made from the seed and its name. So a seed repeats
what everybody sets out to do, and not which of two that meet comes first.
"""
