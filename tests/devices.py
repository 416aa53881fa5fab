"""What tests of one GPU and of several ask their models."""

from __future__ import annotations

from fabula import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
RANDOM = SamplingParams(temperature=1.0, max_tokens=24, seed=7, ignore_eos=True)
PROMPT = "the cat went in there and then all was still on the hill"
