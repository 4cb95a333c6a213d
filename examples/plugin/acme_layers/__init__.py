"""Acme's layers for Trilith."""
