"""How pieces are made: one solver for all, and a check that streams are the model's forward."""

import itertools

import pytest
from safetensors.torch import load_file

from family_studies import build_study, make_pieces
from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.format import WeightFormat
from vlmq_vllm.offline.data.inputs import load_processor, prepare
from vlmq_vllm.offline.data.read import read_all
from vlmq_vllm.offline.methods.choose import grid_of, solver_of
from vlmq_vllm.offline.methods.grid import CLIP, MINMAX, MSE
from vlmq_vllm.offline.model import capture
from vlmq_vllm.offline.settings.sweep import STUDIED, StudySettings
from vlmq_vllm.offline.sweep import make_pieces as making

DECODER = ("language",)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return build_study("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))


def settings(methods=("gptq",), bits=(3,)):
    return StudySettings(bits=bits, methods=methods, group_size=-1)


@pytest.mark.parametrize(("group_size", "symmetric"), [(-1, False), (32, True)])
def test_every_method_and_width_has_the_same_grid_and_solver(group_size, symmetric):
    """`vlmq quantize` chooses the order of columns and the base by width and method; a study does not."""
    study = StudySettings(bits=(2, 3, 4, 8), methods=STUDIED, group_size=group_size, symmetric=symmetric)
    for method, bits in itertools.product(study.methods, study.bits):
        found = study.of(method, bits)
        assert found.format == WeightFormat(bits, group_size, symmetric) and found.method == method
        assert grid_of(found) == (MINMAX if method == "awq" else MSE)  # of AWQ's trials; it clips ranges by itself
        assert found.saliency == "none" and not found.residual
        solver = solver_of(found)
        if method == "awq":
            assert solver.search == CLIP and not solver.compensate
        else:
            assert (solver.search, solver.act_order, solver.damp, solver.qep) == (MSE, True, 0.01, False)


def test_a_piece_does_not_depend_on_other_widths(given, tmp_path):
    for name, bits in (("one", (2,)), ("two", (2, 3))):
        make_pieces(given, settings(bits=bits), tmp_path / name, DECODER)
    paths = sorted((tmp_path / "one/gptq-2").iterdir())
    assert len(paths) == 3
    for path in paths:
        assert path.read_bytes() == (tmp_path / "two/gptq-2" / path.name).read_bytes()
    narrow, wide = (load_file(tmp_path / f"two/gptq-{bits}/{paths[0].name}") for bits in (2, 3))
    assert narrow.keys() == wide.keys()
    packed = [name for name in narrow if name.endswith("weight_packed")]
    assert packed and all(wide[name].numel() > narrow[name].numel() for name in packed)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_model_that_cannot_be_run_layer_by_layer_is_refused(given, tmp_path, monkeypatch, method):
    """Its streams forget what the tower adds after the first decoder layers."""
    catch = capture.catch

    def forgetful(source, stack, batch, device):
        found = catch(source, stack, batch, device)
        if found:
            found.terms.clear()
        return found

    monkeypatch.setattr(capture, "catch", forgetful)
    with pytest.raises(QuantizeError, match=r"language_model.layers.1 differs from the model's own forward"):
        make_pieces(given, settings((method,)), tmp_path / "pieces", DECODER)
    assert not (tmp_path / "pieces").exists()


def test_the_check_takes_the_shortest_sample_with_a_picture_and_only_where_something_is_calibrated(
    given, tmp_path, monkeypatch
):
    checked = []
    monkeypatch.setattr(making, "check_replay", lambda source, probe, device: checked.append(probe))
    make_pieces(given, settings(("rtn",)), tmp_path, DECODER)
    assert not checked
    make_pieces(given, settings(("rtn", "gptq")), tmp_path, DECODER)
    make_pieces(given, settings(("rtn", "gptq")), tmp_path, DECODER)  # nothing is missing
    [probe] = checked
    processor = load_processor(given.model)
    lengths = [prepare(chat, processor)[0]["input_ids"].shape[1] for chat in read_all(given.calibration)]
    assert "pixel_values" in probe and probe["input_ids"].shape == (1, min(lengths)) and min(lengths) < max(lengths)
