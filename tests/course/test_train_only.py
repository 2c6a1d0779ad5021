"""Grades `train_only` (model.py): which parameters a stage trains."""

import pytest
from tiny import tiny_model


def trained(stage, before=()):
    """Returns the names of the parameters that are trained after stages, one set up after another.
    """
    ollm = tiny_model()
    for one in (*before, stage):
        ollm.train_only(one)
    return {name for name, parameter in ollm.named_parameters() if parameter.requires_grad}


NAMES = {name for name, _ in tiny_model().named_parameters()}
LVLM = {name for name in NAMES if name.startswith("lvlm.")}
SINUSOIDS = {"audio_encoder.embed_positions.weight"}


def test_vision_text():
    names = trained("vision-text")
    assert LVLM <= names, "in vision-text all of the LVLM is trained: vision encoder, LLM and head"
    assert names <= LVLM, "in vision-text nothing but the LVLM is trained"


@pytest.mark.parametrize("stage", ["audio-text", "vision-audio"])
def test_stages_with_speech(stage):
    names = trained(stage)
    assert not names & LVLM, f"in {stage} the LVLM is frozen: it is the teacher"
    assert not names & SINUSOIDS, "Whisper's positions are sinusoids, and stay fixed"
    assert names >= {"projector.weight", "projector.bias"}, f"in {stage} the projector is trained"
    assert names == NAMES - LVLM - SINUSOIDS, f"in {stage} all else of the audio encoder is trained"


def test_the_projector_alone():
    ollm = tiny_model()
    ollm.train_only("vision-audio", part="projector")
    names = {name for name, parameter in ollm.named_parameters() if parameter.requires_grad}
    assert names == {"projector.weight", "projector.bias"}, (
        'with the part "projector" the audio encoder is frozen, too')


def test_one_stage_after_another():
    cause = "what the stage before has frozen or trained does not matter"
    assert trained("vision-audio", ["vision-text"]) == NAMES - LVLM - SINUSOIDS, cause
    assert trained("vision-text", ["vision-audio"]) == LVLM, cause
