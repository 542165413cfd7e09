"""Writes the tokenizer of a GGUF file as a Hugging Face directory, for clients that want one.

Load generators count tokens themselves, and make prompts of a wanted length, with a tokenizer that
``transformers`` loads. The directory is made from the file that Headway runs, so both count alike
and nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import decoders, processors

from headway.engine.gguf_vocabulary import SPACE_MARK, build_codec, read_vocabulary
from headway.engine.tokenizer import Tokenizer
from headway.models import registry
from headway.models.gguf_metadata import read_metadata


def write_tokenizer(gguf: Path, output: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``config.json`` into ``output``.

    Raises:
        DamagedModel: the file is damaged, or its tokenizer contradicts itself.
        UnsupportedModel: its tokenizer is not supported.
    """
    metadata = read_metadata(gguf)
    vocabulary = read_vocabulary(metadata)
    codec, _ = build_codec(metadata, vocabulary)
    tokenizer = Tokenizer(metadata)
    # Headway decodes, and puts the BOS token down, without the library; the file must say how.
    codec.decoder = (
        decoders.ByteLevel()
        if vocabulary.byte_level
        else _sentencepiece_decoder(vocabulary.add_space_prefix)
    )
    if vocabulary.add_bos_token and tokenizer.bos_token_id is not None:
        codec.post_processor = processors.TemplateProcessing(
            single=[tokenizer.bos_token, "$A"],
            special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
        )
    output.mkdir(parents=True, exist_ok=True)
    codec.save(str(output / "tokenizer.json"))
    architecture = metadata.string("general.architecture")
    context = metadata.integer(f"{architecture}.context_length")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "bos_token": tokenizer.bos_token or None,
        "eos_token": tokenizer.eos_token or None,
        "pad_token": tokenizer.eos_token or None,
        "chat_template": tokenizer.chat_template,
    }
    _write_json(output / "tokenizer_config.json", settings)
    # Some clients look for a model's type before they look for a tokenizer.
    _write_json(
        output / "config.json",
        {
            "model_type": architecture,
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": context,
        },
    )


def _sentencepiece_decoder(strips_prefix: bool) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to write to")
    parser.add_argument(
        "--model", default=registry.DEFAULT_MODEL, help="a known model or a .gguf file"
    )
    arguments = parser.parse_args()
    write_tokenizer(registry.resolve(arguments.model), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
