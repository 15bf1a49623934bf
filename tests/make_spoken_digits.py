"""Make nndist/datasets/spoken_digits.gz and .csv with Debian's espeak-ng, as spoken_digits.md says.

apt install espeak-ng && python tests/make_spoken_digits.py
"""

import csv
import gzip
import random
import subprocess
import tempfile
from pathlib import Path

from nndist.datasets.spoken import LENGTH, NAMES, PATH, centred, read_wav, to_codes, trimmed

ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc")
VOICES = (
    *("adam", "Alex", "Alicia", "Andrea", "Andy", "Annie", "anika", "antonio", "aunty", "belinda", "benjamin", "boris"),
    *("caleb", "croak", "david", "Denis", "Diogo", "ed", "edward", "edward2", "Gene", "Gene2", "grandma", "grandpa"),
    *("gustave", "Henrique", "Hugo", "iven", "iven2", "iven3", "iven4", "Jacky", "john", "kaukovalta", "klatt"),
    *("klatt2", "klatt3", "Lee", "linda", "marcelo", "Marco", "Mario", "max", "Michael", "michel", "miguel", "Mike"),
    *("pablo", "paul", "pedro", "quincy", "rob", "robert", "steph", "travis", "victor", "f1", "f2", "f3", "f4", "f5"),
    *("m1", "m2", "m3", "m4"),
)


def spoken(text: str, voice: str, accent: str, speed: int, pitch: int):
    """The sound of a text, trimmed and as loud as can be."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "said.wav")
        flags = ["-v", f"{accent}+{voice}", "-s", str(speed), "-p", str(pitch), "-w", str(file)]
        subprocess.run(["espeak-ng", *flags, text], check=True)
        sound = trimmed(read_wav(file))
    return sound / sound.abs().max()


def main() -> None:
    """Write the files into the package."""
    drawn = random.Random(0)
    rows, clips = [], []
    for voice in VOICES:
        accent, pitch, speed = drawn.choice(ACCENTS), drawn.randrange(30, 71), drawn.randrange(150, 231)
        for digit, name in enumerate(NAMES):
            sound = spoken(name, voice, accent, speed, pitch)
            sound = centred(sound) if len(sound) > LENGTH else sound
            clips.append(to_codes(sound).numpy().tobytes())
            rows.append((digit, voice, accent, speed, pitch, len(sound)))
    PATH.write_bytes(gzip.compress(b"".join(clips), compresslevel=9, mtime=0))
    with PATH.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("digit", "voice", "accent", "speed", "pitch", "samples"), *rows])


if __name__ == "__main__":
    main()
