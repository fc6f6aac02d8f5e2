"""What a folder's safetensors headers say of its tensors, without reading them."""

import torch
from safetensors.torch import save_file

from vlmq_vllm.headers import read_headers


def test_sizes_of_tensors_in_their_file(tmp_path):
    dtypes = ("float64", "int64", "float32", "int32", "bfloat16", "float16", "int16", "int8", "uint8", "float8_e4m3fn")
    tensors = {name: torch.zeros(3, 5, dtype=getattr(torch, name)) for name in dtypes}
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {name: info.nbytes for name, info in read_headers(tmp_path).items()}
    assert sizes == {name: tensor.nbytes for name, tensor in tensors.items()}
