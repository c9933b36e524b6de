"""Adapters that every role shares: data sets, problems."""
