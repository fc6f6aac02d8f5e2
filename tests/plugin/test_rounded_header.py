"""The header of a checkpoint whose inputs are rounded to 8 bits: written, read back, refused where it is at odds."""

import pytest

from vlmq_vllm.checkpoint import QuantizationSpec
from vlmq_vllm.errors import CheckpointError
from vlmq_vllm.format import WeightFormat

W3, W4, W8 = (WeightFormat(bits, 32, True) for bits in (3, 4, 8))


@pytest.mark.parametrize(("bits", "version"), [(16, 1), (8, 2)])
def test_header_and_back(bits, version):
    """Readers of version 1 know no activation_bits: they must refuse what they would answer differently."""
    spec = QuantizationSpec(W4, {"a.b": W8}, bits)
    header = spec.to_dict({})
    assert header["format_version"] == version and header.get("activation_bits", 16) == bits
    assert QuantizationSpec.from_dict(header) == spec


def test_headers_without_the_key_are_as_before():
    header = QuantizationSpec(W3, {}).to_dict({})
    assert "activation_bits" not in header and header["format_version"] == 1
    assert QuantizationSpec.from_dict(header).activation_bits == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_bits": 4}, "activation_bits is 4; vlmq has 8 and 16"),
        ({"activation_bits": "8"}, "activation_bits is '8'; vlmq has 8 and 16"),
        ({"activation_bits": None}, "activation_bits is None; vlmq has 8 and 16"),
        ({"activation_bits": True}, "activation_bits is True; vlmq has 8 and 16"),
        ({"format_version": 1}, "activation_bits is 8, which is format_version 2, and config.json says 1"),
        ({"activation_bits": 16}, "activation_bits is 16, which is format_version 1, and config.json says 2"),
        ({"format_version": 3}, "format_version is 3, this vlmq-vllm reads 1 and 2"),
        ({"bits": 3}, "the default has weights of 3 bits; with inputs of 8 bits weights have 4 or 8"),
        ({"overrides": {"a.b": {"bits": 2, "group_size": 32, "symmetric": True}}}, "a.b has weights of 2 bits"),
    ],
    ids=str,
)
def test_refused(change, message):
    header = QuantizationSpec(W4, {}, 8).to_dict({}) | change
    with pytest.raises(CheckpointError, match=message) as refusal:
        QuantizationSpec.from_dict(header)
    assert "\n" not in str(refusal.value)


def test_a_lost_key_is_noticed():
    header = QuantizationSpec(W4, {}, 8).to_dict({})
    del header["activation_bits"]
    with pytest.raises(CheckpointError, match="activation_bits is 16, which is format_version 1"):
        QuantizationSpec.from_dict(header)
