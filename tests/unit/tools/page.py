"""The code of docs/tools.md, by its headings, and what it trains."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mempool

_PAGE = Path(__file__).parents[3] / "docs/tools.md"
_LOCAL = 'mempool.local(shards=2, device="cpu")'

SETTINGS = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "train_sampling_strategy": "sequential"}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"use_distributed_sampler": False}


def code_by_heading() -> dict[str, list[str]]:
    """The code of each section; of what stands before the first, by ""."""
    sections = re.split(r"^## (.*)$", _PAGE.read_text(), flags=re.MULTILINE)
    found = {}
    for heading, text in zip(["", *sections[1::2]], sections[::2], strict=True):
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if blocks:
            found[heading] = blocks
    return found


PAGE = code_by_heading()
_FORGETTING = """
with torch.no_grad():
    for tensor in [*model.parameters(), *(each["exp_avg"] for each in dense.state.values())]:
        tensor.zero_()
memory.param_groups[0]["lr"] = 0.0
"""
_GOING_ON = """
assert memory.param_groups[0]["lr"] == 0.1
assert all(each["exp_avg"].full_tensor().any() for each in dense.state.values() if each["exp_avg"].numel() > 1)
"""
FSDP_SAVED = _FORGETTING.join(["\n".join(PAGE["FSDP2"][:2]), PAGE["FSDP2"][2]]) + _GOING_ON


def page_of(folder: Path, *, address: str = "", ranks: int = 1) -> dict[str, Any]:
    """What the page's first code makes, and the names that its sections leave to the reader. Without a table.

    address: Of the pool that is to be used in place of an embedded one.
    """
    names: dict[str, Any] = {}
    torch.manual_seed(3)
    assert _LOCAL in PAGE[""][0]
    exec(PAGE[""][0].replace(_LOCAL, f"mempool.connect({address!r})" if address else _LOCAL), names)
    names["pool"].drop_table("facts")
    settings = {**SETTINGS, "save_strategy": "no"}
    return names | {"folder": folder, "backend": "eager", "ranks": ranks, "quiet": QUIET, "settings": settings}


def trained(
    page: dict[str, Any], code: str, *, config: mempool.TableConfig | None = None, **names: Any
) -> dict[str, Tensor]:
    """The model's parameters and the table's values, state and steps, after a section's code on a new table."""
    page["pool"].create_table(config or page["config"])
    try:
        return trained_on(page, code, page["pool"].table("facts"), **names)
    finally:
        page["pool"].drop_table("facts")


def trained_on(page: dict[str, Any], code: str, table: mempool.Table, **names: Any) -> dict[str, Tensor]:
    """The same on a table that is there."""
    page["Model"].__init__.__globals__["table"] = table
    torch.manual_seed(5)
    run = {**page, "table": table, **names}
    exec(code, run)
    ids = torch.arange(table.num_slots)
    found = {"values": table.rows(ids), "steps": torch.tensor(table.step_count()), **table.state(ids)}
    model: nn.Module = run["model"]
    for name, tensor in model.state_dict().items():
        full = getattr(tensor, "full_tensor", None)
        found[name.removeprefix("module.")] = (tensor if full is None else full()).detach().clone()
    return found


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 2e-6) -> None:
    assert int(actual["steps"]) == 4
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=atol, msg=name)
