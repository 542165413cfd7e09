"""The default model as vLLM reads it: a Hugging Face directory of bf16 weights, from the GGUF file.

Converted once into ``$HEADWAY_HOME/models/`` (default ``~/.cache/headway/models/``). The directory
appears under its name only when it is whole: a temporary neighbour is renamed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from headway.models import registry

#: The directory's name.
MODEL = f"{registry.DEFAULT_MODEL}-hf-bf16"


def convert(output: Path | None = None) -> Path:
    """The converted model's directory: ``output``, by default the one in Headway's cache.

    One that exists is whole. Otherwise the GGUF file is found or fetched, and converted.

    Raises:
        ModelDownloadFailed: the GGUF file is not there, and could not be fetched.
    """
    output = output or registry.default_home() / "models" / MODEL
    if not output.exists():
        gguf = registry.resolve(registry.DEFAULT_MODEL)
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
            partial = Path(scratch) / output.name
            _write(gguf, partial)
            try:
                partial.rename(output)
            except OSError:  # another process was first
                if not output.exists():
                    raise
    return output


def _write(gguf: Path, output: Path) -> None:
    # Here, because a test that finds the model converted need not wait for PyTorch.
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert the model, and print where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, help="directory to convert to, instead of the one in the cache"
    )
    print(convert(parser.parse_args(arguments).output))


if __name__ == "__main__":
    main()
