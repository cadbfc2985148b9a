"""Shared by all tests."""

from hypothesis import settings

# A loaded machine is no reason for a test to fail.
settings.register_profile("fxsplit", deadline=None)
settings.load_profile("fxsplit")
