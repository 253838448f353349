"""Generates completions on the device, with each prompt computed once per group."""
