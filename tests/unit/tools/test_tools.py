"""Each tool of docs/tools.md, by the lines that stand there, trains what the plain loop trains: model and table."""

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch.distributed import TCPStore

import mempool
from tests.unit.client.grpc_pool import GrpcPoolHere

from .page import FSDP_SAVED, PAGE, QUIET, SETTINGS, page_of, same, trained
from .ranks import BOUND_S, DECODER_IN_A_TRAINER, DECODER_TABLE, SECTIONS, be_second, train_all

# The tools' own, of many kinds.
pytestmark = pytest.mark.filterwarnings("ignore")

DECODER = "A decoder that is there already"
TOOLS = [heading for heading in PAGE if heading not in ("", "Plain", DECODER)]
PLAIN = PAGE["Plain"][0]
LOSS = 'model(**batch)["loss"]'
UNSCALED = PLAIN.replace(
    f"    {LOSS}.backward()",
    f"    with torch.autocast('cpu', torch.bfloat16):\n        loss = {LOSS}\n    loss.backward()",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = page_of(tmp_path_factory.mktemp("page"))
    with names["pool"]:
        yield names


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As torchrun sets it, for one rank."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("heading", TOOLS)
def test_a_tool_trains_what_the_plain_loop_trains(page: dict[str, Any], heading: str) -> None:
    plain = UNSCALED if "GradScaler" in heading else PLAIN
    code = FSDP_SAVED if heading == "FSDP2" else PAGE[heading][0]
    same(trained(page, code), trained(page, plain))


def test_lightning_clips_model_and_tables_together(page: dict[str, Any]) -> None:
    steps = "    dense.step(), memory.step()\n"
    joint = "    mempool.optim.JointOptimizer(dense, memory, max_norm=0.05).step()\n"
    clipped = trained(page, PLAIN.replace(steps, joint))
    same(trained(page, PAGE["Lightning"][0], quiet={**QUIET, "gradient_clip_val": 0.05}), clipped)
    assert not torch.equal(clipped["values"], trained(page, PLAIN)["values"])


def test_a_trainer_goes_on_from_where_model_and_tables_were_saved(
    page: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begun, saved = PAGE["Hugging Face Trainer"]
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 2}
    code = begun.removesuffix("trainer.train()\n") + saved
    same(trained(page, code, folder="run-7", settings=settings), trained(page, PLAIN))
    assert (tmp_path / "run-7/checkpoint-4/tables.pt").exists()


def test_a_decoder_is_given_a_memory_saved_and_loaded(page: dict[str, Any], tmp_path: Path) -> None:
    (code,) = PAGE[DECODER]
    loads = "model.eval(), again.eval()\nassert torch.equal(model(tokens).logits, again(tokens).logits)\n"
    assert trained(page, code + loads, folder=tmp_path)["steps"] == 1


def _store() -> TCPStore:
    """What an agent of torchrun keeps for its ranks to meet in: its port is its own from the start on."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_two_ranks_train_what_one_process_trains(page: dict[str, Any], tmp_path: Path) -> None:
    """Every tool that trains with several ranks, one after the other in the same two processes."""
    expected = {heading: trained(page, PLAIN) for heading in SECTIONS}
    expected["decoder"] = trained(page, DECODER_IN_A_TRAINER, config=DECODER_TABLE)
    context = multiprocessing.get_context("spawn")
    stores, barrier, errors = [_store() for _ in expected], context.Barrier(2), context.Queue()
    ports = [store.port for store in stores]
    here = GrpcPoolHere(shards=2)
    second = context.Process(target=be_second, args=(here.address, tmp_path, ports, barrier, errors))
    second.start()
    try:
        with mock.patch.dict(os.environ):
            found = train_all(0, here.address, tmp_path, ports, barrier)
        second.join(BOUND_S)
        assert second.exitcode == 0
        for heading, result in expected.items():
            # A few steps of AdamW turn last bits of a decoder's gradients into more.
            same(found[heading], result, atol=1e-4 if heading == "decoder" else 2e-6)
        with mempool.connect(here.address) as pool:
            _check_saved(pool, tmp_path)
    except Exception as error:
        if not errors.empty():
            error.add_note(errors.get())
        raise
    finally:
        second.kill()
        here.close()


def _check_saved(pool: mempool.Pool, folder: Path) -> None:
    """The decoder that two ranks trained and saved generates the same tokens here."""
    saved = torch.load(folder / "tokens.pt")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is at the step that was saved
        model = mempool.nn.from_pretrained(base, folder / "memory", pool=pool)
    tokens = model.generate(saved["prompt"], max_new_tokens=6, do_sample=False)  # type: ignore[attr-defined]
    assert torch.equal(tokens, saved["tokens"])
