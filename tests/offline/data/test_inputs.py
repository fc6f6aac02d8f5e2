"""Samples under limits: videos through the model's processor, shrinking, dropping, and no cut inside a picture.

The demo model's processor makes one token of 28 x 28 pixels; of a video, of two frames' 28 x 28 pixels.
"""

import json

import numpy as np
import pytest
from PIL import Image

from vlmq_vllm.errors import QuantizeError
from vlmq_vllm.offline.data import pictures
from vlmq_vllm.offline.data.inputs import Intake, has_vision, load_processor, model_inputs, prepare
from vlmq_vllm.offline.data.pictures import open_video, shrink
from vlmq_vllm.offline.data.read import read_chats


@pytest.fixture(scope="module")
def processor(demo_model):
    return load_processor(demo_model)


@pytest.fixture
def chats(tmp_path):
    """Chats of the given parts in front of a question, in this order; frames are f0.png to f5.png, 112 x 84."""
    for i in range(6):
        Image.new("RGB", (112, 84), (40 * i, 0, 0)).save(tmp_path / f"f{i}.png")
    Image.new("RGB", (336, 168), (0, 200, 0)).save(tmp_path / "wide.png")

    def chats(*samples):
        path = tmp_path / "chats.jsonl"
        turns = [[{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}] for parts in samples]
        path.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
        return sorted(read_chats(path, seed=0), key=lambda chat: int(chat["line"].split()[-1]))

    return chats


WIDE = {"type": "image", "image": "wide.png"}


def frames(count) -> dict:
    return {"type": "video", "video": [f"f{i}.png" for i in range(count)]}


def test_frames_of_a_video(chats, processor):
    """Four frames of 112 x 84 are 2 x 3 x 4 tokens; their pixels are those of the frames, two by two."""
    [chat] = chats([frames(4)])
    [(_, inputs)] = model_inputs([chat], processor, 1, 100)
    ids = inputs["input_ids"][0]
    assert (ids == processor.video_token_id).sum() == 24 and (ids == processor.image_token_id).sum() == 0
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 8]]
    assert inputs["pixel_values_videos"].shape == (2 * 6 * 8, 3 * 2 * 14 * 14)
    own = processor.video_processor
    patches = inputs["pixel_values_videos"].view(2, 48, 3, 2, 14 * 14)  # pair of frames, patch, channel, frame, pixel
    red = patches[:, :, 0].mean(dim=(1, 3)).flatten() * own.image_std[0] + own.image_mean[0]
    assert red.tolist() == pytest.approx([0, 40 / 255, 80 / 255, 120 / 255], abs=1e-4)  # float32 on values near 2
    assert has_vision(inputs)


def test_pictures_and_videos_of_one_sample(chats, processor):
    [chat] = chats([frames(2), WIDE, frames(3)])
    [(_, inputs)] = model_inputs([chat], processor, 1, 200)
    assert inputs["video_grid_thw"].tolist() == [[1, 6, 8], [2, 6, 8]]  # the third frame is doubled
    assert inputs["image_grid_thw"].tolist() == [[1, 12, 24]]
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 12 + 24


@pytest.fixture
def video_file(tmp_path):
    """Forty frames of 64 x 48, each a little lighter, as a video file."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(40):
        writer.write(np.full((48, 64, 3), 6 * i, np.uint8))
    writer.release()
    return path


def test_video_file(video_file, chats, processor):
    """32 frames evenly spaced over 40; JPEG keeps a plain grey to within two steps of 256."""
    found, metadata = open_video(video_file, processor)
    expected = np.linspace(0, 39, 32).astype(int)
    assert list(metadata.frames_indices) == expected.tolist() and metadata.fps == 10
    assert [frame.getpixel((9, 9))[0] for frame in found] == pytest.approx((6 * expected).tolist(), abs=2)
    [(_, inputs)] = model_inputs(chats([{"type": "video", "video": "clip.avi"}]), processor, 1, 200)
    assert inputs["video_grid_thw"].tolist() == [[16, 4, 4]]  # 64 x 48 is brought to 56 x 56


def test_processors_that_choose_frames_are_asked(video_file, demo_model):
    processor = load_processor(demo_model)
    processor.video_processor.do_sample_frames = True
    processor.video_processor.fps = 2  # the clip has 10 frames per second and lasts 4 seconds
    found, metadata = open_video(video_file, processor)
    assert list(metadata.frames_indices) == list(range(0, 40, 5)) and len(found) == 8


def test_given_frames_are_never_sampled(chats, demo_model):
    """Processors that choose frames would need a frame rate, and would drop what was chosen on purpose."""
    processor = load_processor(demo_model)
    processor.video_processor.do_sample_frames = True
    processor.video_processor.num_frames = 2
    inputs, _ = prepare(chats([frames(6)])[0], processor)
    assert inputs["video_grid_thw"].tolist() == [[3, 6, 8]]


def test_video_without_a_decoder(video_file, processor, monkeypatch):
    monkeypatch.setattr(pictures, "DECODERS", (("torchcodec", "a_module_that_is_not_there"),))
    with pytest.raises(QuantizeError, match=r"clip.avi needs a decoder .* pip install torchcodec, or give .* frames"):
        open_video(video_file, processor)


def test_file_that_is_no_video(tmp_path, processor):
    pytest.importorskip("cv2")
    (tmp_path / "clip.avi").write_text("nothing")
    with pytest.raises(QuantizeError, match="cannot decode the video .*clip.avi") as caught:
        open_video(tmp_path / "clip.avi", processor)
    assert "\n" not in str(caught.value)


def test_frames_of_two_sizes(chats, processor):
    [chat] = chats([{"type": "video", "video": ["f0.png", "wide.png"]}])
    with pytest.raises(QuantizeError, match="f0.png ... differ in size .112x84, 336x168.; make them one size"):
        prepare(chat, processor)


def test_processor_without_videos(chats, processor, monkeypatch):
    [chat] = chats([frames(2)])
    monkeypatch.delattr(processor, "video_processor")
    with pytest.raises(QuantizeError, match="line 1 has a video, and the model's processor takes none"):
        prepare(chat, processor)


SIZES = {
    "small enough": ((30, 20), 600, (30, 20)),
    "half": ((336, 168), 336 * 168 // 4, (168, 84)),
    "upright": ((168, 336), 336 * 168 // 4, (84, 168)),
    "odd": ((100, 70), 1000, (37, 26)),  # 100 and 70 times sqrt(1/7) are 37.8 and 26.5
    "strip": ((1000, 1), 10, (10, 1)),
    "one pixel": ((50, 50), 1, (1, 1)),
}


@pytest.mark.parametrize(("size", "limit", "expected"), SIZES.values(), ids=SIZES)
def test_shrinking_keeps_the_aspect(size, limit, expected):
    image = Image.new("RGB", size, (1, 2, 3))
    small = shrink(image, limit)
    assert small.size == expected and small.getpixel((0, 0)) == (1, 2, 3)
    assert (small is image) == (size == expected)


def test_shrinking_makes_fewer_tokens(chats, processor):
    """336 x 168 is 12 x 6 tokens, 168 x 84 is 6 x 3; frames of 112 x 84 stay as they are."""
    samples = chats([WIDE], [frames(2)])
    counts = {}
    for limit in (None, 168 * 84):
        intake = Intake()
        drawn = model_inputs(samples, processor, 2, 200, max_pixels=limit, intake=intake)
        counts[limit] = [int((inputs["input_ids"] == processor.image_token_id).sum()) for _, inputs in drawn]
        assert intake.shrunk == (limit is not None) and intake.used == 2
    assert counts == {None: [72, 0], 168 * 84: [18, 0]}


def test_frames_are_shrunk_too(chats, processor):
    intake = Intake()
    [(_, inputs)] = model_inputs(chats([frames(4)]), processor, 1, 200, max_pixels=56 * 42, intake=intake)
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 4]] and intake.shrunk == 4


def test_what_is_dropped_is_counted(chats, processor):
    """A picture of 72 tokens is too long for a limit of 60 and short enough once it has 18."""
    samples = chats([WIDE], [frames(2)], [WIDE, WIDE], [frames(2)])
    intake = Intake()
    assert len(list(model_inputs(samples, processor, 4, 60, intake=intake))) == 2
    assert (intake.used, intake.too_long, intake.shrunk) == (2, 2, 0)
    around = intake.lengths[1] - 12  # the question and what the template writes
    assert intake.lengths == [around + 72, around + 12, around + 2 * 72 + 2, around + 12]  # and a second pair of marks
    exact = intake.lengths[0]
    assert len(list(model_inputs(samples[:2], processor, 4, exact))) == 2
    assert len(list(model_inputs(samples[:2], processor, 4, exact - 1))) == 1
    intake = Intake()
    assert len(list(model_inputs(samples, processor, 3, 60, max_pixels=168 * 84, intake=intake))) == 3
    assert (intake.used, intake.too_long, intake.shrunk) == (3, 0, 3) and len(intake.lengths) == 3


@pytest.mark.parametrize("limit", [50, 84, 85, 120, 200])  # what holds one picture, and one token less, among them
def test_no_cut_inside_a_picture(limit, chats, processor):
    """Whatever the limit, every sample has as many placeholders as features: four patches each."""
    samples = chats([frames(2)], [WIDE], [WIDE, frames(4)], [WIDE, WIDE])
    for _, inputs in model_inputs(samples, processor, 4, limit):
        ids = inputs["input_ids"][0]
        assert len(ids) <= limit
        for token, pixels in (
            (processor.image_token_id, "pixel_values"),
            (processor.video_token_id, "pixel_values_videos"),
        ):
            assert (ids == token).sum() * 4 == len(inputs.get(pixels, []))


@pytest.mark.parametrize("limits", [{"limit": 0}, {"max_tokens": 0}, {"max_pixels": 0}], ids=str)
def test_limits_below_one(limits, chats, processor):
    with pytest.raises(QuantizeError, match="is 0; it must be at least 1"):
        list(model_inputs(chats([WIDE]), processor, **({"limit": 1, "max_tokens": 100} | limits)))


def test_the_first_token_is_not_written_twice(chats, demo_model):
    """Some templates begin with the token that the tokenizer adds by itself, others leave it to the tokenizer."""
    from tokenizers.processors import TemplateProcessing

    processor = load_processor(demo_model)
    tokenizer, first = processor.tokenizer, "<|endoftext|>"
    tokenizer.bos_token = first
    adding = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adding
    [chat] = chats([WIDE])
    left, _ = prepare(chat, processor)
    processor.chat_template = first + processor.chat_template
    written, _ = prepare(chat, processor)
    assert left["input_ids"].tolist() == written["input_ids"].tolist()
    assert written["input_ids"][0, 0] == tokenizer.bos_token_id != written["input_ids"][0, 1]
