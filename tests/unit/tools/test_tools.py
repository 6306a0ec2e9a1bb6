"""Each tool of docs/tools.md, by the lines that stand there, trains what the plain loop trains: model and table."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mempool

from .page import code_by_heading

# The tools' own, of many kinds.
pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = code_by_heading()
DECODER = "A decoder that is there already"
TOOLS = [heading for heading in PAGE if heading not in ("", "Plain", DECODER)]
LOSS = 'model(**batch)["loss"]'
UNSCALED = PAGE["Plain"][0].replace(
    f"    {LOSS}.backward()",
    f"    with torch.autocast('cpu', torch.bfloat16):\n        loss = {LOSS}\n    loss.backward()",
)
SETTINGS = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "train_sampling_strategy": "sequential"}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page's first code makes."""
    names: dict[str, Any] = {}
    torch.manual_seed(3)
    exec(PAGE[""][0], names)
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


def trained(page: dict[str, Any], code: str) -> dict[str, Tensor]:
    """The model's parameters and the table's values, state and steps, after a section's code on a new table."""
    names = {**page, "table": new_table(page)}
    torch.manual_seed(5)
    exec(code, names)
    return result(names["model"], names["table"])


def new_table(page: dict[str, Any]) -> mempool.Table:
    if "facts" in [table.name for table in page["pool"].tables()]:
        page["pool"].drop_table("facts")
    page["table"] = page["pool"].create_table(page["config"])  # where the page's Model finds it
    return page["table"]


def result(model: nn.Module, table: mempool.Table) -> dict[str, Tensor]:
    found = {"values": table.rows(torch.arange(table.num_slots)), "steps": torch.tensor(table.step_count())}
    found |= table.state(torch.arange(table.num_slots))
    for name, tensor in model.state_dict().items():
        full = getattr(tensor, "full_tensor", None)
        found[name.removeprefix("module.")] = (tensor if full is None else full()).detach().clone()
    return found


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert int(actual["steps"]) == 4
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("heading", TOOLS)
def test_a_tool_trains_what_the_plain_loop_trains(page: dict[str, Any], heading: str, tmp_path: Path) -> None:
    page |= {"folder": tmp_path, "backend": "eager", "quiet": QUIET, "settings": {**SETTINGS, "save_strategy": "no"}}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    plain = UNSCALED if "GradScaler" in heading else PAGE["Plain"][0]
    expected, actual = trained(page, plain), trained(page, PAGE[heading][0])
    same(actual, expected)


def test_lightning_clips_model_and_tables_together(page: dict[str, Any]) -> None:
    page |= {"quiet": {**QUIET, "gradient_clip_val": 0.05}}
    steps = "    dense.step(), memory.step()\n"
    joint = "    mempool.optim.JointOptimizer(dense, memory, max_norm=0.05).step()\n"
    clipped = trained(page, PAGE["Plain"][0].replace(steps, joint))
    same(trained(page, PAGE["Lightning"][0]), clipped)
    assert not torch.equal(clipped["values"], trained(page, PAGE["Plain"][0])["values"])


def test_a_trainer_goes_on_from_where_model_and_tables_were_saved(
    page: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page |= {"folder": "run-7", "settings": {**SETTINGS, "save_strategy": "steps", "save_steps": 2}}
    begun, saved = PAGE["Hugging Face Trainer"]
    expected = trained(page, PAGE["Plain"][0])
    same(trained(page, begun.removesuffix("trainer.train()\n") + saved), expected)
    assert (tmp_path / "run-7/checkpoint-4/tables.pt").exists()


def test_a_decoder_is_given_a_memory_saved_and_loaded(page: dict[str, Any], tmp_path: Path) -> None:
    names = {**page, "folder": tmp_path, "table": new_table(page)}
    (code,) = PAGE[DECODER]
    exec(code, names)
    logits = [names[model].eval()(names["tokens"]).logits for model in ("model", "again")]
    assert torch.equal(*logits)
    assert names["table"].step_count() == 1
