"""The GGUF file as OpenVINO GenAI reads it: its matrices as Q8_0, which adds next to no error.

OpenVINO GenAI reads GGUF files, but takes the minima of Q4_1 from the wrong byte, so that nothing
sensible comes out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, Keys, LlamaFileType
from gguf.quants import dequantize, quantize

#: Left as they are.
_PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0)


def convert(source: Path, directory: Path) -> Path:
    """The converted file in ``directory``; one that exists is whole."""
    output = directory / f"{source.stem.removesuffix('.Q4_1')}-openvino-genai.Q8_0.gguf"
    if not output.exists():
        partial = output.with_suffix(".partial")
        _write(GGUFReader(source), partial)
        partial.rename(output)
    return output


def _write(reader: GGUFReader, path: Path) -> None:
    architecture = reader.fields[Keys.General.ARCHITECTURE].contents()
    writer = GGUFWriter(path, architecture)
    # The writer makes these itself.
    made = {Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE}
    for name, field in reader.fields.items():
        if name not in made and not name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if kind not in _PLAIN:
            data = quantize(dequantize(data, kind), GGMLQuantizationType.Q8_0)
            kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("directory", type=Path, help="to convert to")
    arguments = parser.parse_args()
    print(convert(arguments.gguf, arguments.directory))
