"""Settings of the tests' processes and of all that they start; imported before anything that reads them."""

from __future__ import annotations

import os

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Tests run in several processes: torch and numpy take one processor each. A model of Fabula's has threads of its
    # own.
    "OMP_NUM_THREADS": "1",
    # Threads of OpenMP that wait for work do not spin: the other processes have work for that processor.
    "GOMP_SPINCOUNT": "0",
}.items():
    os.environ.setdefault(_name, _value)
