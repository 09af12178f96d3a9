"""The one door to vLLM: nothing outside this folder imports it, and `environment` is set first.

checks      requirements of engine=vllm on machine and configuration; needs no vLLM
engine      the engine, with the verbs of `mesh.engine`
options     vLLM's arguments from our settings
core        vLLM's engine core in this process, its groups on the replica's ranks alone
titan       the trainer's own model over vLLM's paged KV cache
fused       vLLM's own model, and the trainer's weights as views of its fused ones
sampler     our sampler in the place of vLLM's, and draws, its captured computation
plugin      what a vLLM of its own is told, which serves the model (serving, served)
scheduler   vLLM's scheduler with a fast path for steps that only decode
requests    our requests as vLLM's, and completions from them
"""
