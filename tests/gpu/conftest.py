"""vLLM reads its environment when a test file imports it."""

from mesh.engine.vllm.environment import prepare

prepare()
