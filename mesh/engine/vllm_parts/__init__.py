"""What `mesh/engine/vllm.py`, the door to vLLM, is made of. Nothing else imports vLLM.

checks     what is refused at start-up; needs no vLLM
start      vLLM's engine core in this process, its groups on the replica's ranks alone
titan      the trainer's own model over vLLM's paged KV cache
fused      vLLM's own Qwen3, and the trainer's weights as views of its fused ones
sampler    the draw of every token
"""
