"""An attack from outside: operators, host calls and kills, over whole trainings.

It uses only what users have (`Trainer`, `compose_config`, the command line, `torch.load` of a checkpoint) and shares
nothing with the other tests, so that a fault which these overlook in their own helpers is found here.

    python -m pytest -m slow tests/attack            # `-n 2` for two at a time; about ten minutes on two cores
    ATTACK_SEED=7 python -m pytest -m slow tests/attack     # other places are hit
    ATTACK_SHARE=0.2 python -m pytest -m slow tests/attack  # a fifth of the injections
    python -m tests.attack CASE FAULT                # one injection again, as a failure names it

`networks.py` has the victims, `cases.py` the trainings, `injector.py` the faults, `evidence.py` what is compared,
`verdict.py` the trial and its judgement, `nursery.py` the processes that are killed.
"""
