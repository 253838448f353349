"""Turns a batch into optimizer updates."""
