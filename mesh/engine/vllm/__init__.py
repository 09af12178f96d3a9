"""The one door to vLLM: nothing outside this folder imports it, and `environment` is set first.

checks      what engine=vllm asks of the machine and the configuration; needs no vLLM
engine      the engine, with the verbs of `mesh.engine`
core        vLLM's engine core in this process, its groups on the replica's ranks alone
titan       the trainer's own model over vLLM's paged KV cache
fused       vLLM's own model, and the trainer's weights as views of its fused ones
sampler     the draw of every token, and draws, how it is made
scheduler   vLLM's scheduler with a fast path for steps that only decode
requests    our nouns as vLLM's, and back
"""
