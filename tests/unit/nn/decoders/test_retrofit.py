"""retrofit on decoders of transformers, of random weights: nothing changes at first, everything can train, and what
was saved generates the same tokens."""

import atexit
import copy
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mempool
from mempool.errors import DataLoss, InvalidRequest, NotFound
from mempool.nn import MemoryLayer, from_pretrained, retrofit, save_pretrained
from mempool.wire.channels import loop
from tests.support.serving import served_pool

# The library's own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}
TINY |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPTIONS: dict[str, Any] = {"heads": 2, "topk": 4, "key_dim": 8}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.fixture(scope="module")
def pool() -> Iterator[mempool.Pool]:
    with mempool.local(shards=2, device="cpu") as pool:
        yield pool


@pytest.fixture
def table(pool: mempool.Pool) -> Iterator[mempool.Table]:
    optimizer = mempool.optim.Adagrad(0.1)
    yield pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=16, optimizer=optimizer))
    pool.drop_table("facts")


def tiny(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(5)
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(kind, **TINY, **more)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def bits(logits: Tensor) -> Tensor:
    return logits.view(BITS[logits.dtype])


def train(model: nn.Module, count: int) -> list[float]:
    dense, memory = torch.optim.AdamW(model.parameters(), lr=0.01), mempool.optim.PoolOptimizer(model)
    optimizer = mempool.optim.JointOptimizer(dense, memory)
    losses = []
    for _ in range(count):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_an_added_memory_changes_no_bit_of_the_logits(kind: str, table: mempool.Table) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(kind).to(dtype)
        with torch.no_grad():
            before, names = model(IDS).logits, set(model.state_dict())
            assert retrofit(model, [0, -1], table=table, **OPTIONS) is model
            assert torch.equal(bits(model(IDS).logits), bits(before))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(model(IDS).logits, tiny(kind).to(dtype)(IDS).logits)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, MemoryLayer)}
        assert [name.rsplit(".", 3)[1:] for name in layers] == [["0", "mlp", "memory"], ["2", "mlp", "memory"]]
        assert {parameter.dtype for layer in layers.values() for parameter in layer.parameters()} == {dtype}
        assert names < set(model.state_dict()), "what was there keeps its name"


def test_the_whole_memory_trains_from_the_second_step_on(table: mempool.Table) -> None:
    model = retrofit(tiny().train(), 1, table=table, **OPTIONS)
    model.requires_grad_(False)
    layer = model.get_submodule("model.layers.1.mlp.memory").requires_grad_()
    others = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".memory." not in name}
    before, values = copy.deepcopy(layer.state_dict()), table.rows(range(64))
    losses = train(model, 12)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert not torch.equal(table.rows(range(64)), values)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_trains_the_same(pool: mempool.Pool, use_reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=16))
        model = retrofit(tiny().train(), [0, 2], table=table, **OPTIONS)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        results.append((train(model, 3), table.rows(range(64)), table.step_count()))
        pool.drop_table("facts")
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2] == 3


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_layer_with_a_memory_is_compiled_whole(table: mempool.Table) -> None:
    model = retrofit(tiny(), 0, table=table, **OPTIONS).train()
    train(model, 2)
    ffn, x = model.get_submodule("model.layers.0.mlp"), torch.randn(2, 5, 32)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ffn(x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ffn(x))
    assert not torch.equal(ffn(x), tiny().model.layers[0].mlp(x))


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_what_was_saved_generates_the_same_tokens(mode: Any, pool: mempool.Pool, tmp_path: Path) -> None:
    config = mempool.TableConfig(name="facts", num_slots=64, value_dim=16, optimizer=mempool.optim.Adagrad(0.1))
    table = pool.create_table(config)
    model = retrofit(tiny(), [0, "*.layers.2"], table=table, mode=mode, qk_norm=True, **OPTIONS)
    assert isinstance(model.model.layers[2].mlp, MemoryLayer) == (mode == "replace")
    train(model.train(), 5)
    model.eval()
    tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=False))
    model.save_pretrained(tmp_path / "model")
    save_pretrained(torch.compile(model), tmp_path / "memory")
    assert [path.name for path in (tmp_path / "memory").iterdir()] == ["memory.safetensors"]

    def loaded() -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        return from_pretrained(base, tmp_path / "memory", pool=pool)

    again = loaded()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(again.generate(IDS, max_new_tokens=8, do_sample=False), tokens)
    save_pretrained(again, tmp_path / "memory")  # what was loaded can be saved
    train(model.train(), 1)
    with pytest.warns(UserWarning, match=r"table 'facts' is at step 6, and the memory in .* was saved at step 5"):
        loaded()
    pool.drop_table("facts")
    with pytest.raises(NotFound):
        loaded()
    pool.create_table(mempool.TableConfig(name="facts", num_slots=81, value_dim=16))
    with pytest.raises(InvalidRequest, match=r"num_slots = 81, and .* goes with one of 64"):
        loaded()
    pool.drop_table("facts")


def test_the_pool_is_found_by_the_address_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    stack = AsyncExitStack()
    served = loop.run(stack.enter_async_context(served_pool(1)), timeout_s=60.0)
    try:
        with mempool.connect(served.address) as pool:
            table = pool.create_table(mempool.TableConfig(name="facts", num_slots=64, value_dim=16))
            model = retrofit(tiny(), 0, table=table, **OPTIONS)
            train(model, 2)
            save_pretrained(model, f"file://{tmp_path}/memory/")
            logits = model(IDS).logits
        base = tiny()
        base.load_state_dict(model.state_dict(), strict=False)
        again = from_pretrained(base, tmp_path / "memory")
        table = again.get_submodule("model.layers.0.mlp.memory").table
        assert table.address == served.address
        assert torch.equal(again(IDS).logits, logits)
        (close,) = at_exit
        close()
    finally:
        loop.run(stack.aclose(), timeout_s=60.0)


def test_what_cannot_be_loaded_changes_nothing(table: mempool.Table, pool: mempool.Pool, tmp_path: Path) -> None:
    save_pretrained(retrofit(tiny(), [0, 1], table=table, **OPTIONS), tmp_path)
    file = tmp_path / "memory.safetensors"
    whole = file.read_bytes()
    short = tiny()
    del short.model.layers[1:]
    cases: list[tuple[nn.Module, bytes, type[Exception], str]] = [
        (short, whole, InvalidRequest, "no layer 'model.layers.1.mlp'. LlamaForCausalLM has .*model.layers.0.mlp"),
        (tiny(), whole[:-5], DataLoss, "cut off"),
        (tiny(), whole.replace(b"mempool.retrofit", b"mempool.retrofix"), InvalidRequest, "not written by mempool.nn"),
        (tiny(), whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'), InvalidRequest, "of a newer mempool"),
        (
            tiny(),
            whole.replace(b"1.mlp.memory.half_keys", b"1.mlp.memory.half_kexx"),
            DataLoss,
            "has no model.layers.1",
        ),
        (tiny(), whole.replace(b'\\"key_dim\\": 8', b'\\"key_dim\\": 6'), InvalidRequest, "model's would be"),
    ]
    for model, contents, error, message in cases:
        assert contents != whole or model is short
        file.write_bytes(contents)
        names = list(model.state_dict())
        with pytest.raises(error, match=message):
            from_pretrained(model, tmp_path, pool=pool)
        assert list(model.state_dict()) == names
    file.write_bytes(whole)
    with pytest.raises(InvalidRequest, match="a table of an embedded pool: give pool="):
        from_pretrained(tiny(), tmp_path)
    with pytest.raises(NotFound):
        from_pretrained(tiny(), tmp_path / "nothing", pool=pool)


def test_what_cannot_be_retrofitted_changes_nothing(table: mempool.Table, tmp_path: Path) -> None:
    model = tiny()
    names = list(model.state_dict())
    for layers, options, message in (
        ([0, 9], {}, "no layer 9: model.layers has 3 blocks, 0 to 2"),
        (0, {"mode": "beside"}, 'mode must be "add" or "replace"'),
        (0, {"out": "none"}, 'out follows from where the layer goes with mode="add"; there are keys, ways, '),
        (0, {"haeds": 4}, "haeds is no argument of a MemoryLayer"),
        (0, {"topk": 65}, "topk must be from 1 to the table's 64 slots"),
        (0, {"table": "facts"}, r"give pool.table\('facts'\)"),
        ([0, "model.layers.1.mlp.gate_proj"], {"dim": 0}, "dim must be at least 1"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            retrofit(model, layers, **{"table": table, **options})  # type: ignore[arg-type]
        assert list(model.state_dict()) == names
    two = nn.ModuleDict({"ffn": nn.Bilinear(32, 32, 32)})
    with pytest.raises(InvalidRequest, match=r"ffn \(Bilinear\) is called with input1, input2, .* cannot be replaced"):
        retrofit(two, "ffn", table=table, dim=32, mode="replace")
    with torch.device("meta"), pytest.raises(InvalidRequest, match="on the meta device: load"):
        retrofit(tiny(), 0, table=table)
    with pytest.raises(InvalidRequest, match="nothing was retrofitted to LlamaForCausalLM"):
        save_pretrained(model, tmp_path)
    retrofit(model, 0, table=table, scores=torch.relu, **OPTIONS)
    with pytest.raises(InvalidRequest, match=r"model.layers.0.mlp has a part named 'memory' already"):
        retrofit(model, [1, 0], table=table)
    with pytest.raises(InvalidRequest, match=r"model.layers.0.mlp.memory was made with scores=.*, which no file can"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_linear_layer_and_a_part_that_answers_a_tuple_have_memories_too(table: mempool.Table) -> None:
    class Experts(nn.Module):
        def forward(self, *, hidden: Tensor) -> tuple[Tensor, str]:
            return hidden * 2.0, "scores"

    model = nn.ModuleDict({"experts": Experts(), "linear": nn.Linear(4, 6)})
    with pytest.raises(InvalidRequest, match="how wide the input of experts is does not show"):
        retrofit(model, "experts", table=table, **OPTIONS)
    retrofit(model, "experts", table=table, dim=4, **OPTIONS)
    retrofit(model, "linear", table=table, **OPTIONS)
    x = torch.randn(3, 4)
    hidden, scores = model["experts"](hidden=x)
    assert torch.equal(hidden, x * 2.0)
    assert scores == "scores"
    linear, plain = model["linear"], copy.deepcopy(model["linear"])
    nn.init.ones_(linear.memory.out.bias)
    torch.testing.assert_close(linear(x), plain(x) + 1.0)
