"""The policy: torchtitan's decoder with our own leaf modules, the same object in both roles."""
