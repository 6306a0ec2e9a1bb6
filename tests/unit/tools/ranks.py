"""Two ranks, as torchrun starts them, that go through the tools of docs/tools.md which train with several."""

import gc
import os
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import mempool

from .page import FSDP_SAVED, PAGE, page_of, trained_on

BOUND_S = 120.0
SECTIONS = ["DDP", "FSDP2", "accelerate", "Lightning", "Lightning, manual optimization", "Hugging Face Trainer"]
DECODER_IN_A_TRAINER = """
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(**sizes))
mempool.nn.retrofit(model, layers=1, table=table, heads=2, topk=4, key_dim=8)
tokens = torch.randint(3, 64, (24, 9), generator=torch.Generator().manual_seed(1))
dense, memory = torch.optim.AdamW(model.parameters(), lr=0.01), mempool.optim.PoolOptimizer(model)
optimizer = mempool.optim.JointOptimizer(dense, memory, max_norm=1.0)
arguments = TrainingArguments(
    folder,
    num_train_epochs=1,
    per_device_train_batch_size=loader.batch_size,
    lr_scheduler_type="constant",
    max_grad_norm=0,
    **settings,
)
examples = [{"input_ids": each, "labels": each} for each in tokens]
trainer = Trainer(model, arguments, train_dataset=examples, optimizers=(optimizer, None))
trainer.train()
"""
DECODER_TABLE = mempool.TableConfig(name="facts", num_slots=64, value_dim=16, optimizer=mempool.optim.SGD(1.0))
"""Adagrad would make steps of the last bits of gradients that are nearly 0."""
_SAVE = """
model.eval().save_pretrained(f"{folder}/model")
generated = model.generate(tokens[:2], max_new_tokens=6, do_sample=False)
torch.save({"prompt": tokens[:2], "tokens": generated}, f"{folder}/tokens.pt")
"""


def train_all(
    rank: int, address: str, folder: Path, ports: Sequence[int], barrier: Any
) -> dict[str, dict[str, Tensor]]:
    """What each section trains, as one of two ranks; sets the environment."""
    warnings.simplefilter("ignore")
    barrier.wait(BOUND_S)
    if rank == 0:
        page = page_of(folder, address=address, ranks=2)
    barrier.wait(BOUND_S)
    if rank == 1:
        page = page_of(folder, address=address, ranks=2)
    own = DistributedSampler(page["data"], num_replicas=2, rank=rank, shuffle=False)
    results = {}
    with page["pool"] as pool:
        for heading, port in zip([*SECTIONS, "decoder"], ports, strict=True):
            _be_rank(rank, port)
            barrier.wait(BOUND_S)
            if rank == 0:
                if results:
                    pool.drop_table("facts")
                pool.create_table(DECODER_TABLE if heading == "decoder" else page["config"])
            barrier.wait(BOUND_S)
            # accelerate and the Trainer split batches among ranks by themselves (Lightning would shuffle, too).
            sampler = None if heading in ("accelerate", "Hugging Face Trainer", "decoder") else own
            code = PAGE[heading][0] if heading in PAGE else DECODER_IN_A_TRAINER
            code = FSDP_SAVED if heading == "FSDP2" else code
            loader = DataLoader(page["data"], batch_size=3, sampler=sampler)
            if heading == "decoder":
                code += 'mempool.nn.save_pretrained(trainer.model_wrapped, f"{folder}/memory")\n'
                code += _SAVE if rank == 0 else ""
            results[heading] = trained_on(page, code, pool.table("facts"), loader=loader)
            barrier.wait(BOUND_S)
            _be_alone()
    return results


def be_second(address: str, folder: Path, ports: Sequence[int], barrier: Any, errors: Any) -> None:
    """The second rank, in a process of its own."""
    torch.set_num_threads(1)
    try:
        train_all(1, address, folder, ports, barrier)
    except BaseException:
        errors.put(traceback.format_exc())
        barrier.abort()
        raise


def _be_rank(rank: int, port: int) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in {**world, **place, "TORCHELASTIC_RUN_ID": "tools"}.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _be_alone() -> None:
    gc.collect()  # what wraps a model holds its process group
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
