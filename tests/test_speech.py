"""Spoken questions: numbers in words, and what a voice cannot say is left out."""

import pytest
from test_sources import build_vits

from plumbing import prepared
from plumbing.files import BadInput
from plumbing.media import VOICES, speak
from real import speech


@pytest.mark.parametrize("text, spoken", [
    ("1,234,567", "one million two hundred and thirty four thousand five hundred and sixty seven"),
    ("3,4", "three four"), ("10,20,300", "ten twenty three hundred"), ("12:30", "twelve thirty"),
    ("12:05", "twelve zero five"), ("1990s", "nineteen nineties"), ("2000s", "two thousands"),
    ("$5", "five dollars"), ("$1,200.50", "one thousand two hundred point five zero dollars"),
    ("20%", "twenty percent"), ("0", "zero"), ("0.5", "zero point five"), ("-5", "minus five"),
    ("3.14159", "three point one four one five nine"), ("007", "zero zero seven"),
    ("Is bus 47 later than 12:30?", "Is bus forty seven later than twelve thirty"),
    ("Isn’t it\n“two,three”?", "Isn't it two three"),
    ("10 000", "ten thousand"), ("1 234", "one thousand two hundred and thirty four"),
    ("10\u00a0000", "ten thousand"), ("10\u202f000", "ten thousand"),
    ("in 2020 100", "in two thousand twenty one hundred"), ("10 20", "ten twenty"),
    ("Isn\u2018t it", "Isn't it"), ("isn\u02bct it", "isn't it"),
])
def test_numbers_are_words_before_mms_speaks(text, spoken):
    """An MMS voice drops digits."""
    assert speech.in_words(text) == spoken


@pytest.mark.parametrize("text", [
    "What is 7 + 9? Is bus 47 later than 12:30?", "x = y", "a < b", "R&B", "me@home", "9/11",
    "30 °", "café", "3D", "10th", "1.2.3", "7 - 9", "7-9", "1" * 40, "a_b", "???"])
def test_what_mms_cannot_say_is_refused(text):
    """The voice would leave it out."""
    with pytest.raises(BadInput, match="the voice cannot say: "):
        speech.in_words(text)


@pytest.mark.parametrize("text, is_said", [
    ("What is near the café, 30 °C?", True), ("Is π ≈ 3.14?", False), ("Is π near 3.14?", True),
    ("Is it 10 000?", False), ("Is it 10,000 or 10 20?", True),
    ("Isn’t it — a “half”, ½…?", True), ("What is «naïve» in łódź?", True),
    ("这是什么？", False), ("What is 中?", False), ("これは何", False), ("Что это?", False),
    ("Is 3 < 4?", False), ("Is 3 > 4?", False), ("x^2", False), ("a_b", False), ("a|b", False),
    ("★ or ☆", False), ("♪", False), ("•", False), ("①", False), ("Ａ", False), ("7–9", False),
    ("It is 5 €, 3 × 4 = 12 & 7 % + #2 @ home/work ~ *a* \\ $5 £5 ¥5 §5 ±5 √5 5² ≤ ≥ ≠ ∞", True)])
def test_espeak_says_what_is_written_or_leaves_it_out(tmp_path, text, is_said):
    """espeak-ng reads any Chinese letter as "chinese letter", and passes over < and >."""
    task = "0", {"id": "0", "question": text}
    line = prepared.attempt(speech.speak_espeak, task, folder=tmp_path, seed=0, voices=VOICES)
    assert ("audio" in line) == is_said, line
    if not is_said:
        assert line["skipped"].startswith("the voice cannot say: ")


def test_espeak_says_another_sound_for_each_sign_that_it_is_given():
    """What is left in the questions tells them apart."""
    spoken = {}
    for sign in "éèñßłøæàαβπΔ°±×÷√∞²³½¼€£¥¢§©®™≤≥≠→\\/~=+*#@&%$":
        wave = speak(f"what is {sign} near this")[0].tobytes()
        assert not speech.UNREAD.search(sign) and wave not in spoken, (sign, spoken.get(wave))
        spoken[wave] = sign
    silence = speak("what is near this")[0].tobytes()
    assert silence not in spoken and len(spoken) > 40
    passed_over = [sign for sign in "^_|†‡‰″•★✓♪─█①１" if speech.UNREAD.search(sign)
                   and speak(f"what is {sign} near this")[0].tobytes() == silence]
    assert len(passed_over) == 15


def test_mms_says_what_is_written_or_leaves_it_out(tmp_path):
    """The written question keeps its digits; the speech is that of the words."""
    voice, spoken = build_vits(tmp_path / "voice"), []
    for i, question in enumerate(("Bus 47?", "bus forty seven")):
        (tmp_path / str(i)).mkdir()
        rows = [{"id": "sum", "question": "7 + 9?", "audio": "sum.flac"},
                {"id": "bus", "question": question + "\nA word.", "audio": "bus.flac",
                 "after": "\nA word."}]
        left_out, line = speech.speak_mms(rows, tmp_path / str(i), 0, voice)
        assert left_out == {"id": "sum", "skipped": "the voice cannot say: +"} and line == rows[1]
        spoken.append((tmp_path / str(i) / "bus.flac").read_bytes())
    assert spoken[0] == spoken[1]
