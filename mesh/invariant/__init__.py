"""Batch invariance: one switch for the whole program, after which the bits of a row depend on that
row alone - not on how many rows share the batch, nor on how many ranks share a weight.
"""
