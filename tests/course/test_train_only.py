"""Grades `train_only` (model.py): which parameters a stage trains."""

import pytest
from tiny import tiny_model, untouched

NAMES = {name for name, _ in tiny_model().named_parameters()}
LVLM = {name for name in NAMES if name.startswith("lvlm.")}
PROJECTOR = {"projector.weight", "projector.bias"}
SINUSOIDS = {"audio_encoder.embed_positions.weight"}
EARS = NAMES - LVLM - SINUSOIDS


def trained(*stages, ears=True):
    """Returns the names of what is trained after (stage,) or (stage, part), set up in turn."""
    ollm = tiny_model(ears)
    with untouched(dict(ollm.named_parameters())):
        for stage in stages:
            ollm.train_only(*stage)
    return {name for name, parameter in ollm.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("ears", [True, False])
@pytest.mark.parametrize("part", [(), ("lvlm",)])  # train.py passes the part "lvlm"
def test_vision_text(part, ears):
    names = trained(("vision-text", *part), ears=ears)
    assert names >= LVLM, "in vision-text all of the LVLM is trained: vision encoder, LLM and head"
    assert names <= LVLM, "in vision-text nothing but the LVLM is trained"


@pytest.mark.parametrize("stage", [("audio-text",), ("vision-audio",), ("vision-audio", "audio")])
def test_stages_with_speech(stage):
    names = trained(stage)
    assert not names & LVLM, f"in {stage} the LVLM is frozen: it is the teacher"
    assert not names & SINUSOIDS, "Whisper's positions are sinusoids, and stay fixed"
    assert names == EARS, f"in {stage} the projector is trained, and the audio encoder"


@pytest.mark.parametrize("stage", ["audio-text", "vision-audio"])
def test_the_projector_alone(stage):
    assert trained((stage, "projector")) == PROJECTOR, 'with "projector" the encoder is frozen, too'


@pytest.mark.parametrize("before, stage, expected", [
    (("vision-text",), ("vision-audio",), EARS), (("vision-audio",), ("vision-text", "lvlm"), LVLM),
    (("audio-text",), ("vision-audio", "projector"), PROJECTOR),
    (("audio-text", "projector"), ("vision-audio",), EARS)])
def test_one_stage_after_another(before, stage, expected):
    assert trained(before, stage) == expected, "what the stage before has set does not matter"
