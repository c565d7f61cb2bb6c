"""Where a new test goes.

- `unit/<room>/`: one room of the package, in this process. `make quick` runs those that are not marked `long`.
- `integration/`: whole trainings, processes, installed packages, scripts, notebooks, golden values.
- `gpu/`: what needs a CUDA device: `make gpu`.
- `attack/`: faults anywhere in whole trainings. It shares no code with the other tests.
- `support/`: what several tests are built with.

A test that takes a second or more is marked `long`; one that takes minutes `slow`, and runs by `pytest -m slow`.
"""
