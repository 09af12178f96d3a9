"""The policy: torchtitan's Qwen3 with our own leaf modules, the same object in both roles."""
