"""What `mesh/engine/vllm.py`, the door to vLLM, is made of. Nothing else imports vLLM.

    start      vLLM's engine core in this process, its groups on the replica's ranks alone
    titan      the trainer's own model over vLLM's paged KV cache
    fused      vLLM's own Qwen3, and the trainer's weights as views of its fused ones
    sampler    the draw of every token, and draws, how it is made
    requests   our nouns as vLLM's, and back

vLLM reads its environment when it is imported, so this is set before.
"""

import logging
import os
import warnings

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as the trainer, on any core
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # one runner, and so one sampler, on CPU and CUDA
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # until vLLM does it
warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
