"""The benchmark: ``make bench``; what is measured and how is in README.md beside this."""
