"""Engines turn requests into completions. Every engine keeps this contract:

- `generate(requests, sampling) -> list[Completion]`: one completion for every sample of every
  request, ordered by (prompt_id, sample_id). Tokens depend on the weights, the prompt and
  (seed, step, prompt_id, sample_id, position), never on what shares the batch. Logprobs are
  `mesh.model.logprobs`': log_softmax(logits / temperature) before truncation. An empty list of
  requests gives an empty list. ValueError for a prompt that does not fit the context or the cache.
- `weights() -> dict[str, Tensor]`: the live local shards by torchtitan's names, buffers included;
  the weight bridge writes into them.
- `reset(version)`: the weights have changed. Cached keys and values are dropped, and what was
  cached under another version is unusable.
- `bind(tensors)`: take these tensors, of the same names, shapes and dtypes, in place of its own:
  the trainer's storage, where layouts match.
- `with_settings(settings)`: another engine of the same weights, with other sizes.
- `close()`: let go of what keeps process groups alive.
"""
