"""Translation by attention: the pairs, chrF, the network, and what it writes."""

import pytest
import torch
from conftest import ROOT
from making import make

import nndist
from nndist.config import RunConfig
from nndist.datasets import translation
from nndist.datasets.declaration import TEST_ARTICLES, paragraphs
from nndist.datasets.translation import END, PAD, START, UNKNOWN

NAME = "translation_rnn"


def test_chrf_is_sacrebleus():
    """Of sacrebleu 2.6.0, which smooths by 1e-16 and rounds n-grams' averages alike: equal to 0.01 of 100."""
    said = ["toda persona tiene derecho", "nadie sera detenido", "la libertad de pensamento"]
    truth = ["todo individuo tiene derecho", "nadie será detenido ni preso", "libertad de pensamiento"]
    counts = [translation.chrf_counts(*pair) for pair in zip(said, truth, strict=True)]
    assert [translation.chrf(count) for count in counts] == pytest.approx([48.180, 53.673, 80.229], abs=0.02)
    assert translation.chrf(sum(counts)) == pytest.approx(59.824, abs=0.02)
    assert translation.chrf(translation.chrf_counts("abc", "xyz")) == 0.0
    assert translation.chrf(translation.chrf_counts("igual", "igual")) == pytest.approx(100)


def test_words_are_aligned_where_they_are_alike_and_nothing_is_lost():
    source = ["tota", "persona", "té", "dret", "a", "la", "llibertat", "de", "pensament"]
    target = ["toda", "persona", "tiene", "derecho", "a", "la", "libertad", "de", "pensamiento"]
    pieces = translation.aligned(source, target)
    assert [word for mine, _ in pieces for word in mine] == source
    assert [word for _, other in pieces for word in other] == target
    assert (["llibertat"], ["libertad"]) in pieces and (["pensament"], ["pensamiento"]) in pieces
    assert translation.difference("dret", "derecho") == pytest.approx(4 / 7)


def test_no_test_phrase_is_of_an_article_for_training():
    pairs = translation.load_pairs("Catalan", "Spanish")
    assert len(pairs.train) > 1000 and len(pairs.test) > 50 and not set(pairs.train) & set(pairs.test)
    texts = {}
    for language, article, text in paragraphs():
        if language == "Catalan" and article:
            part = "test" if article in TEST_ARTICLES else "train"
            texts[part] = f"{texts.get(part, '')} | {' '.join(translation.words_of(text))}"
    assert all(source in texts["test"] for source, _ in pairs.test)
    assert all(source in texts["train"] for source, _ in pairs.train)
    assert max(len(text) for pair in pairs.train + pairs.test for text in pair) <= translation.LONGEST


def test_letters_are_numbers_and_back():
    rows = translation.encoded(["dret", "à"], "detr")
    assert rows[0, :6].tolist() == [4, 7, 5, 6, END, PAD] and rows[1, :2].tolist() == [UNKNOWN, END]
    assert translation.decoded(rows[0], "detr") == "dret"
    assert translation.cut("Tota persona té dret a la llibertat de pensament, de consciència") == [
        "tota persona té dret a la",
        "llibertat de pensament de",
        "consciència",
    ]
    assert translation.by_words("tota persona", {"tota": "toda"}) == "toda persona"


def network():
    torch.manual_seed(0)
    recipe = make(NAME, width=8, hidden=8)
    recipe.data(RunConfig(data_source="sample").data_config(download=False))
    return recipe.networks()["model"].eval()


def test_no_letter_sees_those_after_it_and_padding_changes_nothing():
    model = network()
    source, target = torch.randint(4, 20, (2, 9)), torch.randint(4, 20, (2, 7))
    with torch.no_grad():
        whole = model(source, target)
        changed = target.clone()
        changed[:, 4] = 25
        after = model(source, changed)
        torch.testing.assert_close(whole[:, :5], after[:, :5])
        assert (whole[:, 5] - after[:, 5]).abs().max() > 1e-4
        weights = model.alignment(torch.cat([source, torch.full((2, 3), PAD)], 1))
    assert not weights[:, :, 9:].any()
    torch.testing.assert_close(weights.sum(2), torch.ones(2, translation.LONGEST + 1))


def test_greedy_decoding_reads_what_it_has_written():
    model = network()
    source = torch.randint(4, 20, (2, 9))
    with torch.no_grad():
        logits = model(source)
        said = logits.argmax(2)
        again = model(source, said)  # its own letters, given
    torch.testing.assert_close(logits, again, atol=1e-5, rtol=1e-5)
    assert START not in said[:, :0]


def test_a_language_that_is_not_there():
    with pytest.raises(nndist.UserError, match="--from-language 'Latin': must be one of Danish"):
        nndist.train(ROOT / f"recipes/{NAME}.py", from_language="Latin")


def test_an_example_is_scored_by_its_own_pair_in_training_and_test():
    recipe = make(NAME)
    data = recipe.data(None)
    pairs = translation.load_pairs(recipe.from_language, recipe.to_language)
    numbers = {name: examples.tensors[2].tolist() for name, examples in (("train", data.train), ("test", data.test))}
    assert pairs.numbered(numbers["train"]) == pairs.train and pairs.numbered(numbers["test"]) == pairs.test
    written = [translation.decoded(row, recipe.letters) for row in data.train.tensors[1]]
    assert written == [truth for _, truth in pairs.numbered(numbers["train"])]


@pytest.mark.nightly
@pytest.mark.parametrize("epochs, beaten", [(8, "copy"), (15, "words")])
def test_it_beats_a_copy_and_at_the_end_a_dictionary(trained, epochs, beaten):
    result = trained(NAME, epochs=epochs)
    scores = {name: result.scores[f"test/chrf/{name}"] for name in ("network", "words", "copy")}
    assert scores["copy"] == pytest.approx(44.41, abs=0.01) and scores["words"] == pytest.approx(51.62, abs=0.01)
    assert scores["network"] > scores[beaten] + 4
    (answer,) = nndist.predict(result, "tota persona té dret a la llibertat").columns["translation"]
    assert "persona" in answer and "derecho" in answer
