"""vLLM reads its environment when it is imported, so `prepare` comes before its first import."""

import logging
import os
import warnings


def prepare() -> None:
    """Set the variables that an in-process engine needs, and keep vLLM quiet."""
    os.environ.update(
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run in this process
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads, on any core
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # one runner, and so one sampler, on CPU and CUDA
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    level = os.environ["VLLM_LOGGING_LEVEL"]
    logging.getLogger("vllm").setLevel(level)  # until vLLM sets it itself
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
