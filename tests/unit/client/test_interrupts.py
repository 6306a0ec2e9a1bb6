"""A training loop of an embedded pool that is interrupted wherever Python looks for signals: nothing stays taken."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import faulthandler, itertools, sys
import torch
import mempool

faulthandler.dump_traceback_later(60, exit=True)  # what would wait for ever ends here, and below
PLACES = ("/mempool/", "/numba/", "/multiprocessing/", "/threading.py", "/asyncio/", "/contextlib.py", "/weakref.py")
IDS = torch.tensor([[1, 40, 2], [60, 3, 33]])
left = 0

def interrupt(frame, event, _):
    global left
    if event in ("call", "return", "c_return") and any(place in frame.f_code.co_filename for place in PLACES):
        left -= 1
        if not left:
            raise KeyboardInterrupt

def gather(weights):
    return table.gather(IDS, weights)

def gather_async(weights):
    return table.gather_async(IDS, weights).result()

def prefetch(weights):
    table.prefetch(IDS)
    return table.gather(IDS) * weights.sum()

def step():
    look_up(torch.rand(2, 3, requires_grad=True)).sum().backward()

look_up = globals()[sys.argv[1]]
pool = mempool.local(shards=2, timeout_s=5.0)
table = pool.create_table(
    mempool.TableConfig(name="facts", num_slots=64, value_dim=4, page_slots=8, layout="rows")
)
step()
table.commit()
for places in itertools.count(1):
    faulthandler.dump_traceback_later(20, exit=True)
    left = places
    sys.setprofile(interrupt)
    try:
        step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    torch.set_grad_enabled(True)
    table.link.prefetched.drop()  # what nobody has taken is looked through each time
    if left > 0:
        break
assert places > 100, places
assert not table.link._window.num_bytes
table.discard()
step()
assert table.commit() == 1
pool.close()
print(places, "places")
"""


@pytest.mark.parametrize("look_up", ["gather", "gather_async", "prefetch"])
def test_an_interrupt_anywhere_leaves_nothing_taken(look_up: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, look_up],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
