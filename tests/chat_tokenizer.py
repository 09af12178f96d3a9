"""A small tokenizer with the special tokens of a chat model, of which the lowest ends no turn."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mesh.text.tokenizer import make_character_tokenizer

END_OF_TEXT, IM_START, IM_END, EOT, HEADER, PLAIN = range(98, 104)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|header|>"]

CHATML = (
    "{%- for m in messages %}\n{{- '<|im_start|>' + m.role + '\\n' }}\n"
    "{%- if m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}\n"
    "{{- m.content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
)


def saved(path: Path, template: object = None, file: bool = False, eos: object = None) -> Path:
    """A character tokenizer with special tokens, whose lowest is no end of a turn."""
    make_character_tokenizer(path)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens(SPECIALS)
    backend.add_tokens([AddedToken("<plain>", special=False)])
    backend.save(str(path / "tokenizer.json"))
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"bos_token": "<pad>"}
    if file:
        (path / "chat_template.jinja").write_text(str(template))
    elif template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if eos is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return path
