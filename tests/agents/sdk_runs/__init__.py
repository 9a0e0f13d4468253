"""What the SDK tests share: a scripted model, runs to play, and the stores under test.

This directory cannot be a package itself, since ``agents`` is the SDK's name; `conftest.py` makes
``sdk_runs`` importable.
"""
