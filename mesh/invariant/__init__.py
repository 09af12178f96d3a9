"""Batch invariance: one program-wide switch that makes the bits of a row independent of the other
rows in the batch and of the number of ranks that share a weight.
"""
