"""Digits in three ways: the front end on tones, voices and their cache, and training on sounds that are made here."""

import io
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

import digits_in_three_ways
import mempool
from digits import data, retrieval, spectrogram, speech
from digits.data import Items, build, scaled, spelled, written
from digits.errors import DigitsError, needed
from digits.retrieval import top1
from digits.speech import Cached, Sound, Voice, espeak
from digits.train import BATCH, batch

RATE = 16000
VOICE = Voice("de", "f1", 160)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What is computed here is small, and threads that wait for each other are slow where others work too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tone(*hz: float, seconds: float = 0.4, loud: float = 0.3) -> torch.Tensor:
    times = torch.arange(round(seconds * RATE)) / RATE
    return loud * torch.stack([torch.sin(2 * math.pi * each * times) for each in hz]).mean(0)


def chords(voice: Voice, words: Sequence[str]) -> list[Sound]:
    """Two tones after two others, by the word, all a little higher or lower by the speaker, as fast as is asked for."""
    higher = 1.0 + 0.02 * (zlib.crc32(voice.speaker.encode()) % 3)
    sounds = []
    for word in words:
        code = zlib.crc32(f"{word}{voice.language}".encode())
        hz = [higher * 200.0 * 1.25 ** ((code >> 4 * place) % 12) for place in range(4)]
        seconds = 30.0 / voice.speed
        parts = [torch.zeros(800), tone(*hz[:2], seconds=seconds), tone(*hz[2:], seconds=seconds), torch.zeros(300)]
        sounds.append(Sound(torch.cat(parts), RATE))
    return sounds


def test_the_front_end_equals_its_formula_in_float64() -> None:
    samples = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    found = spectrogram.log_mel(samples, RATE)
    size, window, hop = 512, 400, 160
    padded = torch.nn.functional.pad(samples.double(), (window, window))
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(window, dtype=torch.float64) / window)
    energies = []
    for begin in range(0, len(padded) - size + 1, hop):
        frame = torch.zeros(size, dtype=torch.float64)
        frame[(size - window) // 2 :][:window] = padded[begin + (size - window) // 2 :][:window] * hann
        energies.append(spectrogram.mel_filters(size, RATE).double() @ torch.fft.rfft(frame).abs().square())
    expected = torch.stack(energies)
    spoken = (expected.sum(1) > 1e-3 * expected.sum(1).max()).nonzero().flatten()
    expected = expected[int(spoken[0]) : int(spoken[-1]) + 1]
    torch.testing.assert_close(found.double(), (expected / expected.max()).clamp_min(1e-4).log(), rtol=1e-4, atol=1e-4)


def test_a_tone_is_loudest_in_the_band_around_it() -> None:
    for hz in (300.0, 1000.0, 3000.0):
        filters = spectrogram.mel_filters(512, RATE)
        band = int(filters[:, round(hz * 512 / RATE)].argmax())
        assert int(spectrogram.log_mel(tone(hz), RATE).mean(0).argmax()) == band


def test_features_know_nothing_of_loudness_silence_around_and_little_of_speed() -> None:
    word = torch.cat([tone(400.0), tone(1500.0)])
    one = spectrogram.features(word, RATE)
    assert one.shape == (spectrogram.FRAMES * spectrogram.BANDS,)
    torch.testing.assert_close(spectrogram.features(0.1 * word, RATE), one)
    late = torch.cat([torch.zeros(3200), word, torch.zeros(1600)])
    torch.testing.assert_close(spectrogram.features(late, RATE), one, rtol=0.0, atol=0.3)
    fast = torch.cat([tone(400.0, seconds=0.2), tone(1500.0, seconds=0.2)])
    other = torch.cat([tone(1500.0), tone(400.0)])
    near, far = ((one - spectrogram.features(each, RATE)).norm() for each in (fast, other))
    assert near < 0.2 * far
    assert spectrogram.features(torch.zeros(1), RATE).isfinite().all()


def test_words_that_are_spelled_alike_are_near() -> None:
    assert written("de")[7] == "sieben"
    seven = spelled("sieben")
    assert float(seven @ seven) == pytest.approx(1.0)
    assert float(seven @ spelled("Sieben")) == pytest.approx(1.0)
    assert float(seven @ spelled("zeven")) > float(seven @ spelled("acht"))


def test_a_sound_is_spoken_once(tmp_path: Path) -> None:
    asked: list[Voice] = []

    def speak(voice: Voice, words: Sequence[str]) -> list[Sound]:
        asked.append(voice)
        return chords(voice, words)

    cached = Cached(speak, tmp_path / "deep" / "sounds")
    first = cached(VOICE, ["eins", "zwei"])
    again = Cached(speak, tmp_path / "deep" / "sounds")(VOICE, ["eins", "zwei"])
    assert asked == [VOICE]
    for one, other, spoken in zip(first, again, chords(VOICE, ["eins", "zwei"]), strict=True):
        assert torch.equal(one.samples, other.samples)
        assert one.rate == other.rate == RATE
        torch.testing.assert_close(one.samples, spoken.samples, rtol=0.0, atol=1e-4)
    assert len(cached(VOICE, ["drei"])) == 1
    assert len(asked) == 2, "other words are other sounds"
    assert len(list((tmp_path / "deep" / "sounds").iterdir())) == 1


def test_three_ways_find_each_other_on_speakers_and_images_never_seen() -> None:
    ways = build(chords, languages=("en", "de"), trained_speakers=("m1", "m2", "f1"), unseen_speakers=("m5", "f4"))
    assert {name: (len(way.trained.digits), len(way.asked.digits)) for name, way in ways.items()} == {
        "image": (1348, 449), "sound": (120, 40), "text": (20, 20),
    }  # fmt: skip
    assert ways["text"].asked is ways["text"].trained
    options = digits_in_three_ways._parser().parse_args(["--steps", "25"])
    console = Console(record=True, width=120, file=io.StringIO())
    with mempool.local(shards=2) as pool:
        found = digits_in_three_ways.run(ways, pool=pool, options=options, console=console)
        assert pool.tables() == ()
    digits_in_three_ways.print_report(ways, found, console=console)
    printed = console.export_text()
    assert "image -> sound │ 449       │ 40" in printed
    assert "sound: 576 features; trained: 120; asked: 40 never seen" in printed
    assert "text: 256 features; trained: 20; asked: the same" in printed
    assert len(found) == 6
    assert {each.alone for each in found} == {None}
    for each in found:
        assert each.chance == pytest.approx(0.1, abs=0.01)
        assert each.top1 > 0.6, each
        assert each.probe > 0.6, each


def test_a_batch_is_of_one_digit_in_all_ways() -> None:
    places = torch.arange(20)
    items = Items(torch.stack([places, places % 10], dim=1).float(), places % 10)
    drawn, digits = batch({"a": data.Way(items, items), "b": data.Way(items, items)}, torch.Generator().manual_seed(1))
    assert len(digits) == BATCH
    for features in drawn.values():
        assert torch.equal(features[:, 1].long(), digits)
        assert len(features[:, 0].unique()) == 20
    assert not torch.equal(drawn["a"], drawn["b"])


def test_features_are_scaled_by_what_is_trained_alone() -> None:
    trained = Items(torch.tensor([[0.0, 5.0], [2.0, 5.0]]), torch.tensor([0, 1]))
    way = scaled(trained, Items(torch.tensor([[3.0, 7.0]]), torch.tensor([1])))
    torch.testing.assert_close(way.trained.features, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]) / math.sqrt(2.0))
    torch.testing.assert_close(way.asked.features, torch.tensor([[math.sqrt(2.0), 0.0]]))


def test_top1_counts_digits() -> None:
    similarity = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.4, 0.6]])
    assert top1(similarity, torch.tensor([7, 3]), torch.tensor([3, 7, 3])) == 1.0
    assert top1(similarity, torch.tensor([3, 3]), torch.tensor([3, 7, 3])) == 0.5


def test_towers_without_a_memory_are_asked_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "probabilities", lambda way: torch.nn.functional.one_hot(way.asked.digits).double())
    items = Items(torch.eye(10).repeat(2, 1), torch.arange(10).repeat(2))
    ways = {name: data.Way(items, items) for name in ("one", "other")}
    options = digits_in_three_ways._parser().parse_args(["--steps", "20", "--alone"])
    console = Console(record=True, width=120, file=io.StringIO())
    with mempool.local() as pool:
        found = digits_in_three_ways.run(ways, pool=pool, options=options, console=console)
    digits_in_three_ways.print_report(ways, found, console=console)
    assert "top-1   ┃ without memory ┃ linear probes" in console.export_text()
    assert [(each.alone, each.top1, each.probe) for each in found] == [(1.0, 1.0, 1.0)] * 2


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert digits_in_three_ways.main(["--cache", str(tmp_path / "sounds")]) == 1
    assert "espeak-ng is not installed, which speaks the words: apt install espeak-ng" in capsys.readouterr().err
    with pytest.raises(
        DigitsError, match=r"num3words is not installed.*pip install 'mempool\[examples\]', or num3words"
    ):
        needed("num3words", "num3words")
    script = tmp_path / "espeak-ng"
    script.write_text("#!/bin/sh\necho no such voice >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    with pytest.raises(DigitsError, match=r"espeak-ng -v de\+f1 -s 160 --stdout -- eins failed \(1\): no such voice"):
        espeak(VOICE, ["eins"])
    script.write_text("#!/bin/sh\nexec /bin/sleep 30\n", encoding="utf-8")
    monkeypatch.setattr(speech, "_WORD_S", 0.2)
    with pytest.raises(DigitsError, match=r"did not end within 0.2 s"):
        espeak(VOICE, ["eins"])
    with pytest.raises(SystemExit):
        digits_in_three_ways.main(["--steps", "0"])
    assert "train at least 1 step" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="apt install espeak-ng")
def test_espeak_speaks() -> None:
    seven, also, eight = (espeak(voice, [word])[0] for voice, word in (
        (VOICE, "sieben"), (Voice("de", "m1", 190), "sieben"), (VOICE, "acht"),
    ))  # fmt: skip
    assert 0.2 < len(seven.samples) / seven.rate < 2.0
    assert 0.05 < float(seven.samples.abs().max()) <= 1.0
    assert len(also.samples) < len(seven.samples), "faster"
    one, faster, other = (spectrogram.features(*sound) for sound in (seven, also, eight))
    assert torch.cosine_similarity(one, faster, dim=0) > torch.cosine_similarity(one, other, dim=0)
