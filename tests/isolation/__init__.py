"""Tenants that try to see or to touch what belongs to another."""
