"""The policy: torchtitan's Qwen3 with leaf modules of ours, the same object in both roles."""
