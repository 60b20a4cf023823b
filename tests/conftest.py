"""Settings that every test shares."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run: a failure can be repeated, and is never the machine's speed.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")
