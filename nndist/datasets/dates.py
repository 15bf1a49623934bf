"""Dates as written in six languages, paired with ISO 8601; generated from a seed.

A form without a day is paired with ISO 8601's reduced precision: "März 2024" is 2024-03. Ambiguous forms are left out:
day and month as digits with slashes are in US order, and there are no two-digit years.
"""

import calendar
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn

from nndist.data.sets import Tensors
from nndist.prediction.inputs import Answers, Inputs

PAD, START, END = 0, 1, 2
NUM_SPECIAL = 3  # tokens that are not characters
FIRST_YEAR, LAST_YEAR = 1900, 2099
TEST_SHARE = 0.1  # of all calendar months


@dataclass(frozen=True)
class Language:
    """The names, separated by spaces, and forms of one language: `forms` have a day, `month_forms` have none.

    Weeks begin on Monday. In a form, d is the day, m the month and y the year in digits; dd and mm have a leading zero;
    nth is the ordinal; cd and cy are Chinese numerals.
    """

    name: str
    months: str
    short_months: str
    weekdays: str
    forms: tuple[str, ...]
    month_forms: tuple[str, ...]


LANGUAGES = (
    Language(
        "English",
        "January February March April May June July August September October November December",
        "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        (
            *("{month} {d}, {y}", "{d} {month} {y}", "{weekday}, {month} {d}, {y}", "the {nth} of {month}, {y}"),
            *("{short} {d}, {y}", "{m}/{d}/{y}", "{mm}/{dd}/{y}"),
        ),
        ("{month} {y}", "{short} {y}"),
    ),
    Language(
        "German",
        "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
        "Jan. Feb. März Apr. Mai Juni Juli Aug. Sept. Okt. Nov. Dez.",
        "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
        (
            *("{d}. {month} {y}", "{weekday}, {d}. {month} {y}", "{weekday}, den {dd}.{mm}.{y}", "{d}.{m}.{y}"),
            "{d}. {short} {y}",
        ),
        ("{month} {y}", "im {month} {y}"),
    ),
    Language(
        "French",
        "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
        "janv. févr. mars avr. mai juin juil. août sept. oct. nov. déc.",
        "lundi mardi mercredi jeudi vendredi samedi dimanche",
        ("{nth} {month} {y}", "le {nth} {month} {y}", "{weekday} {nth} {month} {y}", "{nth} {short} {y}"),
        ("{month} {y}", "en {month} {y}"),
    ),
    Language(
        "Spanish",
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
        "ene. feb. mar. abr. may. jun. jul. ago. sept. oct. nov. dic.",
        "lunes martes miércoles jueves viernes sábado domingo",
        ("{d} de {month} de {y}", "{weekday}, {d} de {month} de {y}", "el {d} de {month} de {y}", "{d} {short} {y}"),
        ("{month} de {y}", "en {month} de {y}"),
    ),
    Language(
        "Italian",
        "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
        "gen feb mar apr mag giu lug ago set ott nov dic",
        "lunedì martedì mercoledì giovedì venerdì sabato domenica",
        ("{nth} {month} {y}", "{weekday} {nth} {month} {y}", "il {nth} {month} {y}", "{d} {short} {y}"),
        ("{month} {y}", "nel {month} {y}"),
    ),
    Language(
        "Chinese",
        "一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月",
        "1月 2月 3月 4月 5月 6月 7月 8月 9月 10月 11月 12月",
        "星期一 星期二 星期三 星期四 星期五 星期六 星期日",
        (
            *("{y}年{short}{d}日", "{y}年{mm}月{dd}日", "{cy}年{month}{cd}日", "{y}年{short}{d}日{weekday}"),
            *("{cy}年{month}{cd}日{weekday}", "{y}/{m}/{d}"),
        ),
        ("{y}年{short}", "{cy}年{month}"),
    ),
)
CHINESE_DIGITS = "〇一二三四五六七八九"


def chinese_number(number: int) -> str:
    """1 to 99 in Chinese numerals: 21 is 二十一."""
    tens, ones = divmod(number, 10)
    return ("" if tens < 2 else CHINESE_DIGITS[tens]) + ("十" if tens else "") + (CHINESE_DIGITS[ones] if ones else "")


def ordinal(day: int, language: str) -> str:
    """A day of the month as the language's ordinal: 3rd; 1er, 2; 1º, 2."""
    if language == "English":
        suffix = {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th") if day not in (11, 12, 13) else "th"
    else:
        suffix = {"French": "er", "Italian": "º"}.get(language, "") if day == 1 else ""
    return f"{day}{suffix}"


def written(date: datetime.date, language: Language, form: str) -> str:
    """The date in one of the language's forms."""
    return form.format(
        d=date.day,
        dd=f"{date.day:02}",
        nth=ordinal(date.day, language.name),
        cd=chinese_number(date.day),
        m=date.month,
        mm=f"{date.month:02}",
        month=language.months.split()[date.month - 1],
        short=language.short_months.split()[date.month - 1],
        weekday=language.weekdays.split()[date.weekday()],
        y=date.year,
        cy="".join(CHINESE_DIGITS[int(digit)] for digit in str(date.year)),
    )


# Tokens: one per character that occurs in the forms.

SOURCE_CHARACTERS = "".join(
    sorted(
        {
            character
            for language in LANGUAGES
            for form in language.forms + language.month_forms
            for number in range(84)  # every month, every day to the 28th, every weekday and digit
            for character in written(datetime.date(1203 + number, 1 + number % 12, 1 + number % 28), language, form)
        }
    )
)
TARGET_CHARACTERS = "-0123456789"
NUM_SOURCE, NUM_TARGET = NUM_SPECIAL + len(SOURCE_CHARACTERS), NUM_SPECIAL + len(TARGET_CHARACTERS)
SOURCE_LENGTH = 36
TARGET_LENGTH = len("2024-03-05") + 1  # with END


def tokens(texts: Sequence[str], characters: str, length: int, end: bool) -> Tensor:
    """Texts as tokens, int64 [k, length], padded with PAD; with `end`, END follows each text.

    Raises ValueError for a character without a token and for a text that is too long.
    """
    number = {character: place for place, character in enumerate(characters, NUM_SPECIAL)}
    rows = []
    for text in texts:
        if unknown := set(text) - number.keys():
            raise ValueError(f"{text!r}: no date is written with {''.join(sorted(unknown))!r}")
        row = [number[character] for character in text] + [END] * end
        if len(row) > length:
            raise ValueError(f"{text!r}: longer than the {length} tokens of a row")
        rows.append(row + [PAD] * (length - len(row)))
    return torch.tensor(rows).reshape(-1, length)


def read_source(row: Tensor) -> str:
    """The text of a row of source tokens, [length]."""
    return characters_of(row, SOURCE_CHARACTERS)


def read_target(row: Tensor) -> str:
    """The text of a row of target tokens, [length], up to END."""
    return characters_of(row, TARGET_CHARACTERS)


def characters_of(row: Tensor, characters: str) -> str:
    """The text up to the first END or PAD; a START within it is shown as "?"."""
    known = {number: character for number, character in enumerate(characters, NUM_SPECIAL)}
    return "".join(known.get(token, "?") for token in takewhile(lambda token: token not in (PAD, END), row.tolist()))


def source_tokens(texts: Sequence[str]) -> Tensor:
    """Written dates as tokens, int64 [k, SOURCE_LENGTH]; raises ValueError as `tokens` does."""
    return tokens(texts, SOURCE_CHARACTERS, SOURCE_LENGTH, end=False)


# The pairs.


def date_pairs(num_train: int, num_test: int, seed: int) -> tuple[Tensors, Tensors]:
    """Training and test pairs, a pure function of the arguments; each set is three int64 tensors.

    Tokens of the source, [k, SOURCE_LENGTH], and of the target, [k, TARGET_LENGTH]; the language, [k].

    Calendar months are split between the sets first, so no test date is in training in any form, nor any other day of
    its month. Language, form, month and day are drawn uniformly; three of four pairs have a day.
    """
    generator = torch.Generator().manual_seed(seed)
    months = torch.randperm(12 * (LAST_YEAR - FIRST_YEAR + 1), generator=generator)
    num_unseen = round(TEST_SHARE * len(months))
    return drawn(months[num_unseen:], num_train, generator), drawn(months[:num_unseen], num_test, generator)


def drawn(months: Tensor, count: int, generator: torch.Generator) -> Tensors:
    """`count` pairs with dates in the given months, numbered from the start of FIRST_YEAR."""
    chances = torch.rand(count, 5, generator=generator, dtype=torch.float64).tolist()
    known = months.tolist()
    sources, targets, languages = [], [], []
    for month_chance, day_chance, kind_chance, language_chance, form_chance in chances:
        years, month = divmod(known[int(month_chance * len(known))], 12)
        year = FIRST_YEAR + years
        day = 1 + int(day_chance * calendar.monthrange(year, month + 1)[1])
        date = datetime.date(year, month + 1, day)
        number = int(language_chance * len(LANGUAGES))
        has_day = kind_chance < 0.75
        forms = LANGUAGES[number].forms if has_day else LANGUAGES[number].month_forms
        sources.append(written(date, LANGUAGES[number], forms[int(form_chance * len(forms))]))
        targets.append(date.isoformat() if has_day else date.isoformat()[:7])
        languages.append(number)
    return (
        source_tokens(sources),
        tokens(targets, TARGET_CHARACTERS, TARGET_LENGTH, end=True),
        torch.tensor(languages),
    )


def exact_match(said: Tensor, target: Tensor) -> Tensor:
    """Whether each translation is right up to its END, bool [k]; what follows is ignored."""
    return ((said == target) | (target == PAD)).all(1)


def translations(network: nn.Module, inputs: Inputs) -> Answers:
    """The network's translation to ISO 8601 of each date given as text, and its probability."""
    texts = inputs.texts(lambda text: source_tokens([text]))
    chances = network(source_tokens(texts).to(inputs.device)).float().softmax(2).cpu().max(2)  # [k, target]
    counted = (chances.indices == END).cumsum(1) - (chances.indices == END).int() == 0  # up to the first END
    probabilities = torch.where(counted, chances.values, 1.0).prod(1)
    return Answers({"ISO 8601": [read_target(row) for row in chances.indices], "probability": probabilities})


def listing(said: Tensor, source: Tensor, target: Tensor, language: Tensor) -> str:
    """As text, per language: how many translations `said` are right, the first three, and up to ten wrong ones."""
    right, lines = exact_match(said, target), []
    for number, known in enumerate(LANGUAGES):
        of_language = language == number
        first, wrong = of_language.nonzero()[:3, 0].tolist(), (of_language & ~right).nonzero()[:10, 0].tolist()
        lines.append(f"{known.name}: {int(right[of_language].sum()):,} of {int(of_language.sum()):,} right")
        for place in dict.fromkeys(first + wrong):
            answer, correct = (read_target(row[place]) for row in (said, target))
            verdict = "" if right[place] else f"  WRONG, is {correct}"
            lines.append(f"    {read_source(source[place])} -> {answer}{verdict}")
    return "\n".join(lines)
