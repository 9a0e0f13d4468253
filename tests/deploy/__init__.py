"""The files of ``deploy/``, checked as far as that goes without Docker and without a cluster."""
