# ruff: noqa: RUF001  (characters that look alike are what is tested)
"""What a word and a sentence are, in which script, and that no measure is made up where there are none."""

from __future__ import annotations

import math
import re
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.rubrics.english import syllables
from cpt_ray.rubrics.measures import (
    MEASURES,
    folded,
    measure_range,
    measures,
    terms_of,
    whole_sentences,
    why_undefined,
    word_of,
    words_of,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't, don’t, DON‘T", ["don't"] * 3),
        ("the dogs’ bowl; ‘tis rock’n’roll", ["the", "dogs", "bowl", "tis", "rock'n'roll"]),
        ("a so-called 2nd try, 3.14 of 1,000 or 5km", ["a", "so", "called", "2nd", "try", "of", "or", "5km"]),
        ("_very_ snake_case key:value", ["very", "snake", "case", "key", "value"]),
        ("e.g. the U.S.A. in config.py", ["e.g", "the", "u.s.a", "in", "config.py"]),
        ("http://a.org/b?c=1", ["http", "a.org", "b", "c"]),
        ("so 😀👩‍👩‍👧 3️⃣ ½ Ⅳ x² Brand™", ["so", "x", "brand"]),
        ("soft\u00adhyphen zero\u200bwidth \ufeffmark", ["softhyphen", "zero", "width", "mark"]),
        ("STRASSE Straße ΣΟΦΟΣ σοφός", ["strasse", "strasse", "σοφοσ", "σοφόσ"]),
        ("ﬁne ｈｅｌｌｏ", ["fine", "hello"]),
        ("L'e\u0301te\u0301 e\u0301tait tre\u0300s gai.", ["l'été", "était", "très", "gai"]),
        ("vraiment\u202f! 10\u202fkg", ["vraiment", "kg"]),
        ("आज मौसम बहुत अच्छा है।", ["आज", "मौसम", "बहुत", "अच्छा", "है"]),
        ("می\u200cخواهم میخواهم كتـــاب", ["میخواهم", "میخواهم", "كتاب"]),
        ('צה"ל צה״ל', ['צה"ל'] * 2),
        ("한국어 문장입니다.", ["한국어", "문장입니다"]),
        ("今天天气好", ["今", "天", "天", "气", "好"]),
        ("コーヒー ｺｰﾋｰ を飲む", ["コーヒー", "コーヒー", "を", "飲", "む"]),
        ("Ինչո՞ւ այո՛", ["ինչու", "այո"]),
    ],
)
def test_a_word_is_a_segment_with_a_letter(text: str, words: list[str]) -> None:
    assert [unicodedata.normalize("NFC", word) for word in words_of(text)] == [folded(word) for word in words]
    assert words_of(unicodedata.normalize("NFD", text)) == words_of(unicodedata.normalize("NFC", text))


@given(st.text(alphabet="abXY'’ \n,-\"()", max_size=80))
def test_plain_english_has_the_words_that_runs_of_letters_are(text: str) -> None:
    runs = re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower().replace("’", "'"))
    assert words_of(text) == runs


@pytest.mark.parametrize(
    ("text", "sentences", "exclamations", "questions"),
    [
        ("One. Two! Three?", 3, 1, 1),
        ('He said "go." Then "stop!"', 2, 1, 0),
        ("1. Rest\n2. Sleep", 2, 0, 0),
        ("1. Rest.\n2. Sleep.", 2, 0, 0),
        ("Pi is 3.14 in config.py", 1, 0, 0),
        ("Wait... what?! So… yes", 4, 1, 1),
        ("今天好。真的！吗？", 3, 1, 1),
        ("आज। कल॥ क्यों?", 3, 0, 1),
        ("هل هذا صحيح؟ نعم۔", 2, 0, 1),
        ("Τι κάνεις; Καλά! Ναι\u037e", 3, 1, 2),
        ("Wow‼ Really⁉ Yes❗ No❓", 4, 4, 2),
        ("¡Hola! ¿Qué tal?", 2, 1, 1),
        ("Ի՞նչ է։ Այո՜։", 2, 1, 1),
        ("བོད་ཡིག། བོད་ཡིག།", 2, 0, 0),
        ("one; two", 1, 0, 0),
    ],
)
def test_sentences_and_marks_of_every_script_are_counted(
    text: str, sentences: int, exclamations: int, questions: int
) -> None:
    values = measures(text)
    assert values["words_per_sentence"] == pytest.approx(len(words_of(text)) / sentences)
    assert values["exclamation_density"] == pytest.approx(exclamations / sentences)
    assert values["question_density"] == pytest.approx(questions / sentences)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two, thr", "One."),
        ("One. Two! ", "One. Two!"),
        ('He said "go." Then', 'He said "go."'),
        ("(He said go.) Th", "(He said go.)"),
        ("**Bold.** And", "**Bold.**"),
        ("»Hallo.« Und „nein.“ Dann", "»Hallo.« Und „nein.“"),
        ("Really?! Wait… no", "Really?! Wait…"),
        ("Pi is 3.14 in config.py", ""),
        ("Pi is 3. And", "Pi is 3."),
        ("1. Rest.\n2. Sleep and", "1. Rest."),
        ("Rest\n2. Sleep", ""),
        ("1. Rest.\n\n2. Sleep.\n3.", "1. Rest.\n\n2. Sleep."),
        ("今天好。真的！吗", "今天好。真的！"),
        ("आज। कल॥ क्यों", "आज। कल॥"),
        ("هل هذا صحيح؟ نع", "هل هذا صحيح؟"),
        ("Τι κάνεις; Καλ", "Τι κάνεις;"),
        ("what; now", ""),
        ("བོད་ཡིག། བོད", "བོད་ཡིག།"),
        ("... 2!", ""),
        ("", ""),
    ],
)
def test_whole_sentences_end_with_the_last_sentence_end_and_what_closes_there(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole


ENDS = st.sampled_from([".", "!", "?", "...", '."', ".)", "。", "؟", "।"])
WORDS = st.text("abÄ '-,3", min_size=1, max_size=12).map(lambda text: f"a{text}z")


@given(st.lists(st.tuples(WORDS, ENDS), max_size=4), st.sampled_from(["", " ", " the", "\n12", " (see e.g", "\n\n3.1"]))
def test_an_unfinished_sentence_is_what_is_lost(sentences: list[tuple[str, str]], tail: str) -> None:
    text = " ".join(map("".join, sentences))
    assert whole_sentences(text + tail) == text


@given(st.text(alphabet=st.characters() | st.sampled_from('.!?。"”)\n 3a'), max_size=60))
def test_whole_sentences_are_a_beginning_that_stays_as_it_is(text: str) -> None:
    whole = whole_sentences(text)
    assert text.startswith(whole)
    assert whole_sentences(whole) == whole
    assert whole_sentences(whole_sentences(text + " and so") or " and so") == whole
    assert not whole or regex.search(r"\p{L}", whole)


THAI, LAO = "วันนี้อากาศดีมาก เราไปสวน", "ມື້ນີ້ອາກາດດີ"
KHMER, BURMESE = "ថ្ងៃនេះអាកាសធាតុល្អ។", "ဒီနေ့ ရာသီဥတု ကောင်းတယ်။"


@pytest.mark.parametrize("text", [THAI, LAO, KHMER, BURMESE, "OK: " + THAI])
def test_a_script_without_spaces_has_no_measure_and_a_reason(text: str) -> None:
    assert set(measures(text, ("ok",), ("no",)).values()) == {None}
    assert why_undefined(text).startswith("its script is written without spaces")


def test_a_quoted_thai_word_leaves_an_english_text_measured() -> None:
    text = "In Thai restaurants a guest who wants to pay politely asks for the bill (บิล) with both hands joined."
    assert measures(text)["word_count"] == 18


def test_a_text_without_words_has_no_measure() -> None:
    for text in ("", "...", "123!", "😀", "\u200b", "?!"):
        assert set(measures(text, ("a",), ("b",)).values()) == {None}
        assert why_undefined(text) == "it has no word (numbers and signs are none)"
    assert measures("A cat.", ("dog",), ("bird",))["word_balance"] is None
    assert why_undefined("A cat.") == "none of the listed words is in it"


def test_letters_are_counted_as_a_reader_sees_them() -> None:
    for text in ("été", "e\u0301te\u0301", "ét\u00adé", "한국어", "aa\u0308\u0323b"):
        assert measures(text)["mean_word_length"] == 3, ascii(text)
    assert measures("Don't go")["mean_word_length"] == 3.5


def test_a_list_is_read_as_the_text_is() -> None:
    text = "Perhaps I don’t know. Perhaps the 2nd e\u0301te\u0301."
    assert measures(text, ("PERHAPS", "don't", "2ND", "été"))["word_share"] == pytest.approx(5 / 8)
    assert measures(text, ("perhaps",), ("don’t", "Know"))["word_balance"] == pytest.approx(2 / 4)
    assert measures(text, ("i don't", "know."))["word_share"] == 0


@pytest.mark.parametrize("entry", ["of course", "so-called", "e.g.", "C++", "42", "-ing", "l'", "因为", "บิล", "😀", ""])
def test_what_can_never_be_one_word_is_none(entry: str) -> None:
    assert word_of(entry) is None


@given(st.text(max_size=60))
def test_every_ascii_word_of_a_text_is_a_word_of_a_list(text: str) -> None:
    for word in words_of(text):
        if word.isascii():
            assert word_of(word) == word


@given(st.text(max_size=80))
def test_normal_form_and_case_change_no_measure(text: str) -> None:
    lists = tuple(words_of(text)[:2])
    composed = measures(unicodedata.normalize("NFC", text), lists)
    assert measures(unicodedata.normalize("NFD", text), lists) == composed


@given(st.text(max_size=120), st.sampled_from(MEASURES))
def test_every_measure_takes_every_text(text: str, name: str) -> None:
    value = measures(text, ("a", "b"), ("c",))[name]
    least, most = measure_range(name)
    assert value is None or (math.isfinite(value) and least <= value <= most)
    assert (value is None) >= (not words_of(text))


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "a the make made looked called makes eyes friend through street played"),
        (2, "table wanted houses lately homework someone being cruel royal unique rhythm"),
        (3, "idea usual video however family beautiful holiday diary"),
        (4, "necessary experience material information"),
        (5, "sophisticated opportunity vocabulary"),
    ],
)
def test_syllables_are_those_that_are_spoken(count: int, words: str) -> None:
    assert {word: syllables(word) for word in words.split()} == dict.fromkeys(words.split(), count)


@given(
    st.text(alphabet=st.characters(categories=["Lu", "Ll", "Lo", "Nd", "Zs"]) | st.sampled_from("'.,-"), max_size=60)
)
def test_terms_are_unicodes_segments(text: str) -> None:
    """What is searched for is what is left between all word boundaries, but for connectors (here U+202F)."""
    text = unicodedata.normalize("NFC", text).replace("\u202f", " ")
    segments = [folded(segment) for segment in regex.split(r"(?wV1)\b", text) if regex.search(r"[\p{L}\p{N}]", segment)]
    terms = segments or [folded(text).strip()]
    assert [term.lstrip("'") for term in terms_of(text)] == [term.lstrip("'") for term in terms]


def test_terms_keep_numbers_and_marks_apart() -> None:
    assert terms_of("What is 2 + 2?") == ["what", "is", "2", "+", "2"]
    assert terms_of("कि") != terms_of("की")
    assert terms_of("Ｃａｆｅ\u0301 “３”") == terms_of("café 3")
    assert terms_of("Is it 😀?") != terms_of("Is it 😂?")
    assert terms_of("...") != terms_of("?!")


def test_the_english_measures_have_known_values() -> None:
    values = measures("It isn’t a HAPPY table, was it?")
    assert values["character_count"] == 31
    assert values["syllables_per_word"] == pytest.approx((1 + 1 + 1 + 2 + 2 + 1 + 1) / 7)
    assert values["sentiment"] == pytest.approx(-0.4585)  # as of "it isn't a happy table, was it?": negated
    assert values["valence"] == 3  # "happy": a list alone does not see what is negated
    assert measures("A sad and lonely, terrible night.")["valence"] == -2 - 2 - 3
    assert measures("The table has four legs.")["sentiment"] == 0


def test_the_mood_of_a_text_is_the_mean_of_its_sentences() -> None:
    good, bad = "I love this wonderful day!!", "1. It is awful, at 3.14 sad?"
    moods = [measures(one)["sentiment"] or 0 for one in (good, bad)]
    assert moods[1] < 0 < moods[0]
    for text in (f"{good} {bad}", f"{good}\n{bad} ... 3.", f"{bad}  {good}"):
        assert measures(text)["sentiment"] == pytest.approx(sum(moods) / 2)
    assert measures("I love this. " * 9)["sentiment"] == pytest.approx(measures("I love this.")["sentiment"])


@pytest.mark.parametrize("text", ["今天天气很好。", "Сегодня хорошо.", "आज मौसम अच्छा है।"])
def test_without_latin_letters_the_english_measures_are_undefined(text: str) -> None:
    values = measures(text)
    assert [name for name, value in values.items() if value is None and name != "word_balance"] == [
        "syllables_per_word",
        "sentiment",
        "valence",
    ]
    assert why_undefined(text) == "it has no word in Latin letters, or none of a list"


@given(
    st.lists(
        st.sampled_from(["a", "happy", "cat", "terrible,", "LONG", "not", "but", "wept!"]), min_size=1, max_size=12
    )
)
def test_repeated_spaces_and_case_change_no_english_measure(words: list[str]) -> None:
    names = ("syllables_per_word", "sentiment", "valence", "word_count")
    plain, loud = measures(" ".join(words)), measures("  ".join(words).upper() + "\n")
    assert [plain[name] for name in names] == [loud[name] for name in names]


@given(st.text(max_size=40))
def test_a_text_and_its_edges_have_the_same_characters(text: str) -> None:
    assert measures(f"  {text.strip()}\n")["character_count"] == measures(text.strip())["character_count"]


def test_a_good_word_more_lifts_and_a_bad_one_lowers_both_moods() -> None:
    for name in ("sentiment", "valence"):
        low, even, high = (
            measures(f"It is a {word} house.")[name] or 0 for word in ("terrible", "wooden", "wonderful")
        )
        assert low < even == 0 < high
