"""Spoken digits: the sounds, their spectrograms, voices that training never hears, and WAV files."""

import csv
import math
import wave

import pytest
import torch
from making import data_of, figure, is_drawn, make, module_of

import nndist
from nndist.data.sets import ExampleRandom
from nndist.datasets import spoken

NAME = "spoken_digits"


def tone(hertz, rate=spoken.RATE, seconds=0.4):
    return 0.9 * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)) / rate)


def write_wav(path, sound, rate, channels=1, width=2):
    values = (sound * 32767).short() if width == 2 else (sound * 127 + 128).to(torch.uint8)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(values.repeat_interleave(channels).numpy().tobytes())
    return path


def test_every_voice_says_every_digit_and_the_page_says_who_speaks():
    said = spoken.load_digits()
    assert said.codes.shape == (len(said.voices), spoken.LENGTH) and said.codes.max() < spoken.LEVELS
    assert len(said.codes) == 10 * len(set(said.voices)) == 650
    assert all(sorted(said.digits[n : n + 10].tolist()) == list(range(10)) for n in range(0, 650, 10))
    text = spoken.PATH.with_name("spoken_digits.md").read_text()
    assert "No person speaks" in text and "GPL-3.0" in text and "65 voices" in text


def test_no_test_voice_is_heard_in_training():
    said, data = spoken.load_digits(), data_of(NAME)
    voice_of = {codes.numpy().tobytes(): voice for codes, voice in zip(said.codes, said.voices, strict=True)}
    parts = [
        {voice_of[codes.numpy().tobytes()] for codes in examples.tensors[0]}
        for examples in (data.train, data.val, data.test)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 65 and len(parts[2]) == 16


def test_mu_law_and_back_is_near():
    sound = torch.linspace(-1, 1, 1001)
    back = spoken.from_codes(spoken.to_codes(sound))
    assert ((back - sound).abs() <= 0.004 + 0.08 * sound.abs()).all()
    assert spoken.from_codes(torch.tensor([spoken.LEVELS // 2], dtype=torch.uint8)).item() == 0


@pytest.mark.parametrize("hertz", [300, 1000, 2500])
def test_a_tone_is_loudest_in_the_band_of_its_frequency(hertz):
    (image,) = spoken.log_mel(spoken.centred(tone(hertz, seconds=0.8)).unsqueeze(0))[0]
    assert image.shape == (spoken.MELS, spoken.FRAMES)
    assert image.mean().abs() < 1e-4 and image.std().item() == pytest.approx(1, abs=1e-3)
    middle = spoken.mel_filters()[round(hertz * spoken.WINDOW / spoken.RATE)].argmax()
    assert image.mean(1).argmax() == middle


@pytest.mark.parametrize("rate, channels, width", [(8000, 1, 2), (22050, 1, 2), (44100, 2, 2), (8000, 1, 1)])
def test_a_wav_file_of_any_kind_is_the_same_sound(tmp_path, rate, channels, width):
    read = spoken.read_wav(write_wav(tmp_path / "tone.wav", tone(440, rate), rate, channels, width))
    assert len(read) == 3200
    torch.testing.assert_close(read[400:2800], tone(440)[400:2800], atol=0.03, rtol=0)


def test_silence_around_a_sound_is_cut_off():
    sound = torch.cat([torch.zeros(3000), tone(500), torch.zeros(2000)])
    assert 3200 <= len(spoken.trimmed(sound)) < 3700
    assert len(spoken.trimmed(sound[3000:3100])) == 100, "shorter than what its loudness is taken over"
    assert spoken.centred(torch.ones(9000)).shape == spoken.centred(torch.ones(100)).shape == (spoken.LENGTH,)


def test_changes_follow_from_seed_epoch_and_example_alone():
    changed, data = module_of(NAME).changed, data_of(NAME)
    numbers = torch.tensor([5, 2, 9])
    batch = data.prepare(next(iter(data.train.batches([numbers]))))

    def image(part, epoch=0):
        return changed(tuple(t[part] for t in batch), ExampleRandom(0, epoch, numbers[part]))[0]

    torch.testing.assert_close(image(slice(None))[1:], image(slice(1, 3)))
    assert not torch.equal(image(slice(None)), image(slice(None), epoch=1))
    assert make(NAME, vary=False).data(None).augment is None


def test_it_learns_and_reads_wav_files(trained, tmp_path):
    """A smaller network, 6 epochs; the documented accuracy takes longer."""
    result = trained(NAME, epochs=6, channels=8, hidden=16, lr=5e-3, batch_size=40)
    assert result.scores["test/accuracy"] > 0.4
    assert is_drawn(figure(result, "spectrograms.png")) and is_drawn(figure(result, "confusion_matrix.png"))
    assert "nearest training spectrogram" in figure(result, "baseline.txt").read_text()
    said = spoken.load_digits()
    sounds = spoken.from_codes(said.codes[:10])  # of a training voice
    files = [write_wav(tmp_path / f"{n}.wav", sound, spoken.RATE) for n, sound in enumerate(sounds)]
    rows = nndist.predict(result, *files).rows()
    with torch.no_grad():
        answers = result.networks["model"](spoken.log_mel(sounds)).argmax(1).tolist()
    agree = sum(row["answer"] == spoken.NAMES[answer] for row, answer in zip(rows, answers, strict=True))
    assert agree >= 8 and {row["answer"] for row in rows} <= set(spoken.NAMES)
    bad = tmp_path / "no.wav"
    bad.write_text("nothing")
    predictions = nndist.predict(result, files[0], bad)
    assert len(predictions.rows()) == 1 and "no.wav: can't be read as a WAV file" in predictions.failures[0]


def test_the_table_is_of_the_sounds():
    with spoken.PATH.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert max(int(row["samples"]) for row in rows) <= spoken.LENGTH and {row["accent"][:2] for row in rows} == {"en"}
