"""Engines turn requests into completions. Every engine keeps this contract:

- `add(requests, sampling)`: queue every sample of every request, also while others run. One
  sampling is in flight at a time, and one request of a prompt_id. ValueError for another, and for a
  prompt that does not fit the context or the cache; then nothing is added.
- `step() -> list[Completion]`: draw a token for every sequence that fits, after its prompt, and
  return the completions that this finished. An idle engine returns an empty list.
- `extend(continuations)`: queue the next turn of samples that are kept: whose request `keeps` them
  and whose turn `step` has returned. Nothing waits for them: their pages are free to be taken, and
  what was taken is computed again. A turn's completion has its own tokens. ValueError for what is
  not kept, or does not fit; then nothing is queued.
- `drop(keys)`: end samples that are kept. `kept`: their keys.
- `unfinished`: true until steps have nothing left to do.
- `generate(requests, sampling) -> list[Completion]`: the loop over these (`generation.generate`),
  one completion for every sample, ordered by (prompt_id, sample_id).
- `weights() -> dict[str, Tensor]`: the live local shards by torchtitan's names, buffers included;
  the weight bridge writes into them.
- `bind(tensors)`: take these tensors, of the same names, shapes and dtypes, in place of its own:
  the trainer's storage, where layouts match.
- `reset(version)`: the weights have changed. Cached keys and values are dropped, and those cached
  under another version are unusable. RuntimeError while requests are unfinished or samples kept.
- `release()`: free the cache's memory until requests are added, where settings.releases says so.
- `with_settings(settings)`: another engine of the same weights, with other sizes.
- `close()`: free everything that keeps process groups alive.

A completion depends on the weights, the tokens before it and (seed, step, prompt_id, sample_id,
position), not on its batch nor on when it was added, nor on whether keys and values were kept
between turns; in batch-invariant mode to the bit. Positions count from the end of the prompt, with
the tokens of replies. Its logprobs are
those of `mesh.model.logprobs`: log_softmax(logits / temperature) before truncation, or with
`Sampling.truncated_logprobs` over the truncated set. Ids without a
text (`ModelShape.textless`) have probability 0.
"""
