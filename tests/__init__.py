"""Where a new test goes.

- `unit/<room>/`: one room of the package, in this process, in a second or less: `make quick` runs them.
- `integration/`: whole trainings, processes, installed packages, scripts, notebooks, golden values.
- `gpu/`: what needs a CUDA device: `make gpu`.
- `attack/`: faults anywhere in whole trainings. It shares no code with the other tests.
- `support/`: what several tests are built with.

A test that takes minutes is marked `slow`, and runs by `pytest -m slow`.
"""
