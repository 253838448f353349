"""Trains a grid of settings one after another, and compares them over seeds."""
