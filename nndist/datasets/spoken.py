"""Spoken digits, embedded, and sounds as networks read them: mu-law, log-mel spectrograms, WAV files.

spoken_digits.md says how the digits were synthesised.
"""

import csv
import functools
import gzip
import math
import wave
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nndist.files import printable
from nndist.prediction.inputs import Inputs

PATH = Path(__file__).with_name("spoken_digits.gz")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000  # samples per second
LENGTH = 6400  # samples of an example: 0.8 s
LEVELS = 64  # of mu-law: 6 bits
WINDOW, HOP, MELS = 256, 80, 32  # samples, samples (10 ms), bands
FRAMES = 1 + LENGTH // HOP


@dataclass(frozen=True)
class Spoken:
    """Sounds: mu-law codes, uint8 [n, LENGTH]; digits, int64 [n]; the voice of each, and how it speaks."""

    codes: Tensor
    digits: Tensor
    voices: tuple[str, ...]
    ways: tuple[str, ...]


@functools.cache
def load_digits() -> Spoken:
    """All the embedded digits, each in the middle of silence."""
    codes = torch.frombuffer(bytearray(gzip.decompress(PATH.read_bytes())), dtype=torch.uint8)
    with PATH.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clips = codes.split([int(row["samples"]) for row in rows])
    return Spoken(
        torch.stack([centred(clip, silence=LEVELS // 2) for clip in clips]),
        torch.tensor([int(row["digit"]) for row in rows]),
        tuple(row["voice"] for row in rows),
        tuple(f"{row['accent']}, {row['speed']} words per minute, pitch {row['pitch']}" for row in rows),
    )


def centred(clip: Tensor, silence: float = 0) -> Tensor:
    """A sound, [samples], in the middle of LENGTH samples; what is too long is cut at both ends."""
    spare = LENGTH - len(clip)
    if spare < 0:
        return clip[-spare // 2 :][:LENGTH]
    return torch.nn.functional.pad(clip, (spare // 2, spare - spare // 2), value=silence)


def to_codes(sound: Tensor) -> Tensor:
    """Mu-law codes, uint8, of a sound within -1 and 1."""
    mu = LEVELS - 1
    squeezed = sound.sign() * torch.log1p(mu * sound.abs()) / math.log1p(mu)
    return (squeezed * LEVELS / 2 + LEVELS / 2).floor().clamp(0, LEVELS - 1).to(torch.uint8)


def from_codes(codes: Tensor) -> Tensor:
    """The sound, float32 within -1 and 1, of mu-law codes; that of silence is 0."""
    mu = LEVELS - 1
    levels = (torch.arange(LEVELS, device=codes.device, dtype=torch.float32) + 0.5) / (LEVELS / 2) - 1
    levels[LEVELS // 2] = 0
    return (levels.sign() * torch.expm1(levels.abs() * math.log1p(mu)) / mu)[codes.long()]


@functools.cache
def mel_filters() -> Tensor:
    """Triangular filters from frequencies to mel bands, [WINDOW // 2 + 1, MELS], from 60 Hz to 3.9 kHz."""

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    edges = 700 * (10 ** (torch.linspace(mel(60), mel(3900), MELS + 2, dtype=torch.float64) / 2595) - 1)
    hertz = torch.arange(WINDOW // 2 + 1, dtype=torch.float64).unsqueeze(1) * RATE / WINDOW
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (hertz - low) / (middle - low), (high - hertz) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0).float()


def log_mel(sounds: Tensor) -> Tensor:
    """Sounds, [k, LENGTH], as log-mel spectrograms, [k, 1, MELS, FRAMES], each with mean 0 and deviation 1."""
    window = torch.hann_window(WINDOW, device=sounds.device)
    spectrum = torch.stft(sounds, WINDOW, HOP, window=window, return_complex=True).abs().square()
    bands = mel_filters().to(sounds.device).T @ spectrum  # [k, MELS, FRAMES]
    loudest = bands.amax((1, 2), keepdim=True).clamp_min(1e-8)
    scaled = torch.log10((bands / loudest).clamp_min(1e-5))  # within 50 dB of the loudest
    mean, deviation = scaled.mean((1, 2), keepdim=True), scaled.std((1, 2), keepdim=True).clamp_min(1e-3)
    return ((scaled - mean) / deviation).unsqueeze(1)


def resampled(sound: Tensor, rate: int) -> Tensor:
    """A sound, [samples], at RATE instead of `rate`, without what lies above half of the lower one."""
    if rate == RATE or not len(sound):
        return sound
    count = max(1, round(len(sound) * RATE / rate))
    spectrum = torch.fft.rfft(sound.double())
    kept = min(len(spectrum), count // 2 + 1)
    padded = torch.zeros(count // 2 + 1, dtype=spectrum.dtype)
    padded[:kept] = spectrum[:kept]
    return (torch.fft.irfft(padded, count) * count / len(sound)).float()


def trimmed(sound: Tensor) -> Tensor:
    """A sound, [samples], from where its loudness over 20 ms first exceeds 2 % of its peak to where it last does.

    A sound of less than 20 ms stays as it is.
    """
    if len(sound) < 160:
        return sound
    loudness = torch.nn.functional.avg_pool1d(sound.abs().view(1, 1, -1), 160, 40, ceil_mode=True).flatten()
    loud = (loudness > 0.02 * sound.abs().max()).nonzero().flatten()
    return sound[int(loud[0]) * 40 : int(loud[-1]) * 40 + 160] if len(loud) else sound


def read_wav(path: Path) -> Tensor:
    """A WAV file of 8 or 16 bits, of any rate and number of channels, at RATE, float32 [samples] within -1 and 1.

    Raises OSError, EOFError, ValueError or wave.Error if it can't be read.
    """
    with wave.open(str(path), "rb") as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        if width not in (1, 2):
            raise ValueError(f"{8 * width} bits a sample; convert it to 16")
        raw = bytearray(file.readframes(60 * rate))
    if not raw:
        raise ValueError("holds no sound")
    values = torch.frombuffer(raw, dtype=torch.int16 if width == 2 else torch.uint8).float()
    values = values / 32768 if width == 2 else values / 128 - 1
    return resampled(values.reshape(-1, channels).mean(1), rate)


def given_sounds(inputs: Inputs) -> Tensor:
    """A person's WAV files as the networks take digits, [k, 1, MELS, FRAMES] on the inputs' device: without the silence
    before and after, as loud as the embedded ones. What can't be read is reported in `failures`."""
    sounds = []
    for item in inputs.items:
        try:
            sound = trimmed(read_wav(Path(str(item))))
        except (OSError, EOFError, ValueError, wave.Error) as error:
            inputs.failures.append(f"{printable(str(item))}: can't be read as a WAV file ({error})")
            continue
        sounds.append(centred(sound / sound.abs().max().clamp_min(1e-6)))
        inputs.names.append(str(item))
    inputs._need_some("WAV files of one digit each")
    return log_mel(from_codes(to_codes(torch.stack(sounds))).to(inputs.device))
