"""Engines turn requests into completions. Every engine keeps this contract:

- `add(requests, sampling)`: queue every sample of every request, also while others run. One
  sampling is in flight at a time, and one request of a prompt_id. ValueError for another, and for a
  prompt that does not fit the context or the cache; then nothing is added.
- `step() -> list[Completion]`: run all sequences that fit for one step (one more token each, after
  their prompts) and return the completions that this finished. Idle, it returns an empty list.
- `unfinished`: true until a step has nothing left to do.
- `generate(requests, sampling) -> list[Completion]`: the loop over these (`generation.generate`),
  one completion for every sample, ordered by (prompt_id, sample_id).

A completion depends on the weights, the prompt and (seed, step, prompt_id, sample_id, position):
never on what shares the batch, nor on when it was added. Its logprobs are `mesh.model.logprobs`':
log_softmax(logits / temperature) before truncation.

- `weights() -> dict[str, Tensor]`: the live local shards by torchtitan's names, buffers included;
  the weight bridge writes into them.
- `reset(version)`: the weights have changed. Cached keys and values are dropped, and what was
  cached under another version is unusable. RuntimeError while requests are unfinished.
- `bind(tensors)`: take these tensors, of the same names, shapes and dtypes, in place of its own:
  the trainer's storage, where layouts match.
- `with_settings(settings)`: another engine of the same weights, with other sizes.
- `close()`: let go of what keeps process groups alive.
"""
