import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import demo
from mempool.config import load
from mempool.config.cluster import StorageConfig

ROOT = Path(demo.__file__).parents[1]
TEMPLATE = ROOT / "cluster" / "local.yaml"


@pytest.fixture(autouse=True)
def signals_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(demo, "_OUT", tmp_path)
    monkeypatch.chdir(ROOT)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_the_config_is_the_local_one_with_name_port_and_ray_of_its_own(tmp_path: Path) -> None:
    made, template = load(demo.write_config("demo-1", folder=tmp_path / "out", template=TEMPLATE)), load(TEMPLATE)
    assert (made.pool.name, made.pool.port, made.pool.shards) == ("demo-1", 0, 2)
    assert made.ray.address == "local"
    assert made.tables == template.tables
    assert made.shard.storage == StorageConfig(path=str(tmp_path / "out" / "storage"))
    assert made.shard.model_copy(update={"storage": None}) == template.shard
    assert made.pool.bind == template.pool.bind


@pytest.mark.parametrize(
    ("text", "missing"), [("shard:\npool: {name: a, port: 1}\n", "  name: ..."), ("shard: {}\n", "shard:")]
)
def test_a_template_without_the_expected_lines_is_refused(tmp_path: Path, text: str, missing: str) -> None:
    template = tmp_path / "odd.yaml"
    template.write_text(text, encoding="utf-8")
    with pytest.raises(demo.DemoError, match=rf"odd\.yaml has no line `{missing}`"):
        demo.write_config("demo-1", folder=tmp_path, template=template)


def faked(monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException) -> list[str]:
    """Records the commands instead of running them; the one that contains a word fails."""
    ran: list[str] = []

    def run(*arguments: str, captured: bool = False) -> str:
        ran.append(" ".join(arguments))
        if failing and failing in ran[-1]:
            raise error
        return '{"address": "127.0.0.1:5"}' if captured else ""

    monkeypatch.setattr(demo, "_run", run)
    return ran


def test_commands_run_in_order_and_the_trainer_gets_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = faked(monkeypatch, "", KeyboardInterrupt())
    assert demo.main(["--epochs", "3"]) == 0
    assert [command.split()[2] for command in ran if command.startswith("-m")] == [
        *("up", "status"),
        *("down", "up", "status"),
        "down",
    ]
    assert "--address 127.0.0.1:5" in ran[2]
    assert ran[6] == f"examples/ask_fact.py --address 127.0.0.1:5 --model {demo._OUT / 'model.pt'}"
    assert "--drop" not in ran[3], "what is asked is what was kept"
    assert ran[7].endswith("--drop --yes")
    assert ran[2].endswith(" --epochs 3")  # after the demo's own, so that it counts


def test_it_says_where_the_time_went(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str, captured: bool = False) -> str:
        if "examples/train_facts.py" in arguments:
            (demo._OUT / "facts.json").write_text('{"spent_s": {"training the memory": 7.25}}', encoding="utf-8")
        return '{"address": "127.0.0.1:5"}' if captured else ""

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setenv("DEMO_BEGAN", str(time.time() - 100.0))
    assert demo.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    spent = {line[10:]: float(line[:8]) for line in lines if line[:8].strip().replace(".", "").isdigit()}
    assert 99.0 < spent["setting up"] < 130.0
    assert spent["trainer: training the memory"] == 7.2
    assert {
        "Ray and the pool, up; the rest of its kernels compiled, or all found",
        "Ray and the pool, down",
    } < spent.keys()


@pytest.mark.parametrize(
    ("failing", "error", "code", "ended"),
    [
        (" up ", demo.DemoError("no"), 1, False),  # `up` cleans up behind itself
        ("status", demo.DemoError("no"), 1, True),
        ("train_facts", demo.DemoError("no"), 1, True),
        ("train_facts", KeyboardInterrupt(), 130, True),
        ("down", demo.DemoError("no"), 1, True),
        ("ask_fact", demo.DemoError("no"), 1, True),
    ],
)
def test_the_pool_is_ended_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException, code: int, ended: bool
) -> None:
    ran = faked(monkeypatch, failing, error)
    assert demo.main([]) == code
    assert any(" down " in command for command in ran) is ended


def test_a_command_that_fails_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(demo.DemoError, match="`python -c 'raise SystemExit\\(3\\)'` ended with 3"):
        demo._run("-c", "raise SystemExit(3)")
    assert demo._run("-c", "print('out')", captured=True) == "out\n"
    assert "$ python -c" in capfd.readouterr().out
